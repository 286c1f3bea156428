// The grids that columns are rounded to, 64 rows at a time; see ops/gptq.py: nearest_level is the definition.
#pragma once

#include "arithmetic.h"

namespace qat {

constexpr int kVectors = 4, kLanes = 64;
// The compiler's own vectors: on a processor with narrower ones each is several.
typedef float Vector __attribute__((vector_size(64)));

struct Block {
  const float* columns;  // [count, rows]: what is rounded, or products
  const float* current;  // [count, rows]: the values that coordinate descent starts from
  const float* matrix;   // [count, count]: what a column loses for the error of another, and the diagonal
  const float* step;     // [count, rows]
  int64_t count, rows;
  int16_t* codes;  // [count, rows]
  float* errors;   // [count, rows]
};

template <bool kZero>
struct Integers {
  const float* zero;  // [count, rows], or null
  float low, high;

  inline void nearest(const float* x, const float* step, int64_t at, int64_t lanes, int16_t* codes,
                      float* value) const {
    for (int64_t l = 0; l < lanes; ++l) {
      float code = round_even(x[l] / step[l]);
      if (kZero) code = clamp(code + zero[at + l], low, high);
      else code = clamp(code, low, high);
      codes[l] = static_cast<int16_t>(static_cast<int32_t>(code));
      value[l] = (kZero ? code - zero[at + l] : code) * step[l];
    }
  }
};

// A code is how many thresholds lie below the value; with NaN all of them, as in torch.bucketize.
struct Table {
  const float* values;      // [count + 1]
  const float* thresholds;  // [count], ascending
  int64_t count;

  inline void nearest(const float* x, const float* step, int64_t, int64_t lanes, int16_t* codes, float* value) const {
    int32_t code[kLanes] = {};
    float scaled[kLanes];
    for (int64_t l = 0; l < lanes; ++l) scaled[l] = x[l] * (step[l] > 0.0f ? 1.0f / step[l] : 0.0f);
    int64_t left = count;
    for (; left > 1; left -= left / 2) {
      const int32_t half = static_cast<int32_t>(left / 2);
      for (int64_t l = 0; l < lanes; ++l) code[l] += thresholds[code[l] + half - 1] >= scaled[l] ? 0 : half;
    }
    for (int64_t l = 0; l < lanes && left; ++l) code[l] += thresholds[code[l]] >= scaled[l] ? 0 : 1;
    for (int64_t l = 0; l < lanes; ++l) {
      codes[l] = static_cast<int16_t>(code[l]);
      value[l] = values[code[l]] * step[l];
    }
  }
};

}  // namespace qat
