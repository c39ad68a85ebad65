#include "anchored.cuh"

void fastpo::anchored_pingpong_stats(const AnchoredTile& t, int device, int multiprocessors,
                                     void* stream) {
  launch_sums<PingPong, anchored_words(true)>(t, device, multiprocessors, stream);
}
