#include "anchored.cuh"

void fastpo::anchored_pingpong(const AnchoredTile& t, int device, int multiprocessors,
                               void* stream) {
  launch_sum<PingPong, anchored_words(true)>(t, device, multiprocessors, stream);
}
