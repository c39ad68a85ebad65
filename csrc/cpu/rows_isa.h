// One table of row functions per instruction set; each lives in a file with its own compiler flags.
//
// Everything those files use is in anonymous namespaces and no standard template is instantiated:
// the linker merges same-named inline functions, and an AVX-512 copy must not win for all.
#pragma once

#include "fastpo/rows.h"

namespace fastpo {

struct RowTable {
  void (*(*forward)(const ForwardTile&))(const ForwardTile&, int64_t);
  void (*(*backward)(const BackwardTile&))(const BackwardTile&, int64_t);
};

extern const RowTable kRowsScalar;
extern const RowTable kRowsAvx2;
extern const RowTable kRowsAvx512;

}  // namespace fastpo
