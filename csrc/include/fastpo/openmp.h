#pragma once

namespace fastpo {

// Throws where torch has no OpenMP to run on; only in what zig compiles, see csrc/zig/on_gomp.cpp.
void find_openmp();

}  // namespace fastpo
