#include "anchored.cuh"

void fastpo::anchored_cooperative(const AnchoredTile& t, int device, int multiprocessors,
                                  void* stream) {
  launch_sum<Cooperative, anchored_words(false)>(t, device, multiprocessors, stream);
}
