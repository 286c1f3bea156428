// What the kernels share: rounding, clamping and 16-bit floats, with the bits of PyTorch's operations.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qat {

// Halves go to the even neighbour, as torch.round.
inline float round_even(float x) { return __builtin_rintf(x); }
inline double round_even(double x) { return __builtin_rint(x); }

// NaN stays NaN, as in torch.clamp: both comparisons are false.
inline float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// A bfloat16 is the upper half of a float32.
inline float from_bfloat16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Rounds to nearest, halves to even; a NaN becomes the NaN that PyTorch makes.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded);
}

// Share `part` of `parts` of `count` pieces of work: [begin, end).
inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

}  // namespace qat
