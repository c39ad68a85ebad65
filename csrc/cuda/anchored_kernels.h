// The anchored products, each in a file of its own: several compilers share the work.
#pragma once

#include "fastpo/anchored.h"

namespace fastpo {

using AnchoredKernel = void(const AnchoredTile& tile, int device, int multiprocessors,
                            void* stream);

AnchoredKernel anchored_cooperative, anchored_cooperative_stats, anchored_pingpong,
    anchored_pingpong_stats;

}  // namespace fastpo
