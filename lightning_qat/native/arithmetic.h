// What the kernels share: rounding, clamping and 16-bit floats, with the bits of PyTorch's operations.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace qat {

// Halves go to the even neighbour, as torch.round.
inline float round_even(float x) { return __builtin_rintf(x); }

// NaN stays NaN, as in torch.clamp: both comparisons are false.
inline float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// bfloat16 as its bits: the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(BFloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void store(float& to, float value) { to = value; }

// Rounds to nearest, halves to even.
inline void store(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = value != value ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded);
}

// Stores 0 or the value as it is. Wide numbers let the compiler vectorize the choice.
inline void store_unless(bool zero, float& to, float value) { to = zero ? 0.0f : value; }
inline void store_unless(bool zero, BFloat16& to, BFloat16 value) {
  to.bits = static_cast<uint16_t>(zero ? 0u : static_cast<uint32_t>(value.bits));
}

// The compiler has float16 on x86 with SSE2 and on 64-bit ARM: HALVES is defined where kernels for it are made.
#if defined(__FLT16_MANT_DIG__)
#define HALVES 1
inline float load(_Float16 x) { return static_cast<float>(x); }
inline void store(_Float16& to, float value) { to = static_cast<_Float16>(value); }
inline void store_unless(bool zero, _Float16& to, _Float16 value) {
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  const uint16_t kept = static_cast<uint16_t>(zero ? 0u : static_cast<uint32_t>(bits));
  std::memcpy(&to, &kept, 2);
}
#endif

// Asks for the line of memory that a loop reaches 2 KB further on: the processor's own prefetching ends with each page
// of 4 KB, and falls behind where several tensors are read. Where nothing lies there, nothing happens.
template <typename T>
inline void ask_ahead(const T* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + 2048);
}

// The same of a line that is to be written: what another core has read last is taken from it. Asked for as if to be
// read it would have to be asked for twice, which took a tenth of the time of a pass and its products.
template <typename T>
inline void ask_ahead_to_write(T* at) {
  __builtin_prefetch(reinterpret_cast<char*>(at) + 2048, 1);
}

// Share `part` of `parts` of `count` pieces of work begins here.
inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

}  // namespace qat
