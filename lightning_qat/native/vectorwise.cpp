// Vector-wise int8 in the precision of float16: definitions in ops/vectorwise.py, to the last bit.
#include "widen.h"

using namespace qat;

#if defined(HALVES)

namespace {

constexpr int64_t kPiece = 1024;

struct Places {
  uint8_t* columns;  // which have an outlier somewhere
  float limit;       // magnitudes of this and more; a negative one is none
};

// As float16 rounds it: a magnitude above 65504 is infinite.
template <typename T>
void round_to_half(const T* x, int64_t count, float* to) {
  _Float16 halves[kPiece];
  for (int64_t from = 0; from < count; from += kPiece) {
    const int64_t n = count - from < kPiece ? count - from : kPiece;
    widen(x + from, n, to + from);
    narrow(to + from, n, halves);
    widen(halves, n, to + from);
  }
}

template <>
void round_to_half(const _Float16* x, int64_t count, float* to) {
  widen(x, count, to);
}

// By bits: a NaN is larger than infinity, and comes through.
float absmax_of(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float value;
  std::memcpy(&value, &most, 4);
  return value;
}

// Writes 0.0 over outliers. Threads may mark one column at once: all write the same.
void take_outliers(float* row, int64_t columns, const Places& places) {
  for (int64_t c = 0; c < columns; ++c) {
    if (std::fabs(row[c]) >= places.limit) {
      row[c] = 0.0f;
      __atomic_store_n(places.columns + c, uint8_t{1}, __ATOMIC_RELAXED);
    }
  }
}

// As PyTorch divides a number by a tensor. Infinite for a row of zeros, whose steps are thus NaN, and their codes 0.
inline float codes_to_a_unit(float absmax) { return 1.0f / absmax * 127.0f; }

inline int8_t code_of(float step) { return static_cast<int8_t>(static_cast<int32_t>(round_even(step))); }

// `memory` has a row for each thread.
template <typename T>
void quantize(const T* x, int8_t* codes, float* absmax, int64_t rows, int64_t columns, const Places& places,
              float* memory, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    float* row = memory + part * columns;
    for (int64_t r = share(rows, part, threads); r < share(rows, part + 1, threads); ++r) {
      round_to_half(x + r * columns, columns, row);
      float most = absmax_of(row, columns);
      if (places.limit >= 0.0f && !(most < places.limit)) {  // beside a NaN there may be an outlier
        take_outliers(row, columns, places);
        most = absmax_of(row, columns);
      }
      absmax[r] = most;
      const float factor = codes_to_a_unit(most);
      int8_t* to = codes + r * columns;
      for (int64_t c = 0; c < columns; ++c) {
        const float step = row[c] * factor;
        to[c] = code_of(step == step ? step : 0.0f);
      }
    }
  }
}

// With given scales, beyond which values get an end code.
template <typename T>
void codes(const T* x, const float* absmax, int8_t* to, int64_t rows, int64_t columns, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    float steps[kPiece];
    const float factor = codes_to_a_unit(absmax[r]);
    for (int64_t from = 0; from < columns; from += kPiece) {
      const int64_t n = columns - from < kPiece ? columns - from : kPiece;
      round_to_half(x + r * columns + from, n, steps);
      int8_t* part = to + r * columns + from;
      for (int64_t c = 0; c < n; ++c) {
        const float step = steps[c] * factor;
        part[c] = code_of(step == step ? clamp(step, -127.0f, 127.0f) : 0.0f);
      }
    }
  }
}

}  // namespace

#define FAMILY(NAME, T)                                                                                              \
  extern "C" void quantize_##NAME(const T* x, int8_t* codes, float* absmax, int64_t rows, int64_t columns,           \
                                  uint8_t* places, float limit, float* memory, int32_t threads) {                    \
    quantize<T>(x, codes, absmax, rows, columns, Places{places, limit}, memory, threads);                            \
  }                                                                                                                  \
  extern "C" void codes_##NAME(const T* x, const float* absmax, int8_t* to, int64_t rows, int64_t columns,           \
                               int32_t threads) {                                                                    \
    codes<T>(x, absmax, to, rows, columns, threads);                                                                 \
  }

FAMILY(float32, float)
FAMILY(bfloat16, BFloat16)
FAMILY(float16, _Float16)

#endif
