// The anchored product with the sum of exponentials alone, and the choice of the kernel.
#include "anchored.cuh"

void fastpo::anchored_cuda(const AnchoredTile& t, int device, int multiprocessors, void* stream) {
  if (t.n == 0) return;
  if (t.sums != 1) return anchored_stats_cuda(t, device, multiprocessors, stream);
  launch<RowSum>(t, device, multiprocessors, stream);
}
