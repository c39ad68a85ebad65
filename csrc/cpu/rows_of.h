// All row functions over one vector wrapper, for the file that is compiled for its instructions.
#pragma once

#include "backward.h"
#include "forward.h"
#include "pair_rows.h"
#include "rows_isa.h"
#include "words.h"

namespace {

template <class S>
constexpr fastpo::RowTable rows_of(const char* name) {
  return {name,
          choose_forward<S>,
          choose_backward<S>,
          pair_softmaxes_row<S>,
          pair_values_row<S>,
          pair_gradients_row<S>,
          choose_word_products<S>,
          choose_word_sums<S>};
}

}  // namespace
