// The choice of the anchored product's kernel.
#include "anchored_kernels.h"

void fastpo::anchored_cuda(const AnchoredTile& t, int device, int multiprocessors, void* stream) {
  if (t.n == 0) return;
  const bool alone = t.sums == 1;
  AnchoredKernel& kernel = t.pingpong ? (alone ? anchored_pingpong : anchored_pingpong_stats)
                                      : (alone ? anchored_cooperative : anchored_cooperative_stats);
  kernel(t, device, multiprocessors, stream);
}
