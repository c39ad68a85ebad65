// bfloat16 and float16 as bits, converted in software, round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline BFloat16 to_bfloat16(float x) {
  const uint32_t u = bits(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t size = x.bits & 0x7fffu;
  if (size >= 0x7c00u) return from_bits(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  if (size < 0x0400u) {  // subnormal: a multiple of 2^-24
    return from_bits(sign | bits(static_cast<float>(size) * 0x1p-24f));
  }
  return from_bits(sign | ((size << 13) + (112u << 23)));
}

inline Float16 to_float16(float x) {
  const uint32_t u = bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t size = u & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u;
  } else if (size >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal at the last bit
    half = bits(from_bits(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

}  // namespace
