// Stretches of numbers to float32 and back, in a few instructions where the compiler makes one for each element.
#pragma once

#include "arithmetic.h"

#if defined(__AVX512F__) && !defined(WITHOUT_INTRINSICS)
#include <immintrin.h>
#define WIDE 1
#endif

namespace qat {

template <typename T>
inline void widen(const T* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) store(to[i], x[i]);
}

#if defined(HALVES) && defined(WIDE)

template <>
inline void widen(const _Float16* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  }
  for (; i < count; ++i) to[i] = load(x[i]);
}

template <>
inline void narrow(const float* x, int64_t count, _Float16* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
  for (; i < count; ++i) store(to[i], x[i]);
}

#endif

}  // namespace qat
