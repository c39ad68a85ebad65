#include "rows_of.h"
#include "vectors/avx512.h"

namespace fastpo {

extern const RowTable kRowsAvx512 = rows_of<Avx512>("AVX-512");

}  // namespace fastpo
