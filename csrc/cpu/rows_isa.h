// One table of row functions per instruction set; each lives in a file with its own compiler flags.
//
// Everything those files use is in anonymous namespaces and no standard template is instantiated:
// the linker merges same-named inline functions, and an AVX-512 copy must not win for all.
#pragma once

#include "fastpo/pair_rows.h"
#include "fastpo/rows.h"
#include "fastpo/words.h"

namespace fastpo {

template <class Work>
using Row = void (*)(const Work&, int64_t);

struct RowTable {
  const char* name;
  Row<ForwardTile> (*forward)(const ForwardTile&);
  Row<BackwardTile> (*backward)(const BackwardTile&);
  Row<PairSoftmaxes> pair_softmaxes;
  Row<PairValues> pair_values;
  Row<PairGradients> pair_gradients;
  Row<WordProducts> (*word_products)(const WordProducts&);
  Row<WordSums> (*word_sums)(const WordSums&);
};

extern const RowTable kRowsScalar;
extern const RowTable kRowsAvx2;
extern const RowTable kRowsAvx512;
extern const RowTable kRowsNeon;

// Whether this processor has all that files in AVX-512 are compiled for; only on x86-64.
bool has_avx512();

}  // namespace fastpo
