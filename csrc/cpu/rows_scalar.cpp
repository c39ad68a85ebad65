#include "backward.h"
#include "forward.h"
#include "pair_rows.h"
#include "rows_isa.h"
#include "vector_scalar.h"
#include "words.h"

namespace fastpo {

extern const RowTable kRowsScalar = {choose_forward<Scalar>,     choose_backward<Scalar>,
                                     pair_softmaxes_row<Scalar>, pair_values_row<Scalar>,
                                     pair_gradients_row<Scalar>, choose_word_products<Scalar>,
                                     choose_word_sums<Scalar>};

}  // namespace fastpo
