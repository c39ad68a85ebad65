#include "anchored.cuh"

void fastpo::anchored_cooperative_stats(const AnchoredTile& t, int device, int multiprocessors,
                                        void* stream) {
  launch_sums<Cooperative, anchored_words(false)>(t, device, multiprocessors, stream);
}
