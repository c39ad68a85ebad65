#include "backward.h"
#include "forward.h"
#include "pair_rows.h"
#include "rows_isa.h"
#include "vector_avx2.h"
#include "vector_scalar.h"
#include "words.h"

namespace fastpo {

extern const RowTable kRowsAvx2 = {choose_forward<Avx2>,     choose_backward<Avx2>,
                                   pair_softmaxes_row<Avx2>, pair_values_row<Avx2>,
                                   pair_gradients_row<Avx2>, choose_word_products<Avx2>,
                                   choose_word_sums<Avx2>};

}  // namespace fastpo
