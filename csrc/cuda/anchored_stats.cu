// The anchored product with all kAnchoredSums sums.
#include "anchored.cuh"

void fastpo::anchored_stats_cuda(const AnchoredTile& t, int device, int multiprocessors,
                                 void* stream) {
  launch<RowSum, RowSum, RowSum, RowSum, RowSum>(t, device, multiprocessors, stream);
}
