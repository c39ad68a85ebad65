#include "backward.h"
#include "forward.h"
#include "pair_rows.h"
#include "rows_isa.h"
#include "vector_avx512.h"
#include "vector_scalar.h"
#include "words.h"

namespace fastpo {

extern const RowTable kRowsAvx512 = {choose_forward<Avx512>,     choose_backward<Avx512>,
                                     pair_softmaxes_row<Avx512>, pair_values_row<Avx512>,
                                     pair_gradients_row<Avx512>, choose_word_products<Avx512>,
                                     choose_word_sums<Avx512>};

}  // namespace fastpo
