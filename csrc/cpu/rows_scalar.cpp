#include "backward.h"
#include "forward.h"
#include "rows_isa.h"
#include "vector_scalar.h"

namespace fastpo {

extern const RowTable kRowsScalar = {choose_forward<Scalar>, choose_backward<Scalar>};

}  // namespace fastpo
