#include "rows_of.h"
#include "vectors/neon.h"

namespace fastpo {

extern const RowTable kRowsNeon = rows_of<Neon>("NEON");

}  // namespace fastpo
