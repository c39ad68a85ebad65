#include "rows_of.h"
#include "vectors/avx2.h"

namespace fastpo {

extern const RowTable kRowsAvx2 = rows_of<Avx2>("AVX2");

}  // namespace fastpo
