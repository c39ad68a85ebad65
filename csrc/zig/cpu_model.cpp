// What __builtin_cpu_supports reads. zig's runtime has these names and leaves them empty, so that
// no processor would have more than SSE2; bits as gcc and clang number them, of those that are
// asked for.
#include <cpuid.h>

extern "C" {

[[gnu::visibility("hidden")]] struct {
  unsigned vendor, type, subtype, features[1];
} __cpu_model = {};

[[gnu::visibility("hidden")]] unsigned __cpu_features2[4] = {};

[[gnu::visibility("hidden")]] int __cpu_indicator_init() {
  unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // registers that the system saves
  const bool fma = c & bit_FMA, wide = (low & 0x6) == 0x6, wider = (low & 0xe6) == 0xe6;
  if (!wide || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const auto has = [b](bool saved, unsigned bit, int place) {
    return static_cast<unsigned>(saved && (b & bit)) << place;
  };
  __cpu_model.features[0] = has(wide, bit_AVX2, 10) | static_cast<unsigned>(fma) << 14 |
                            has(wider, bit_AVX512F, 15) | has(wider, bit_AVX512VL, 20) |
                            has(wider, bit_AVX512BW, 21) | has(wider, bit_AVX512DQ, 22);
  return 0;
}

}  // extern "C"
