#include "rows_of.h"
#include "vectors/scalar.h"

namespace fastpo {

extern const RowTable kRowsScalar = rows_of<Scalar>("scalar");

}  // namespace fastpo
