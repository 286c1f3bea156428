// The grid of one scale, and walks over tensors in which neighbours share one. See ops/layout.py for [outer, C, inner].
#pragma once

#include "arithmetic.h"

namespace qat {

// Codes reach half a step beyond their value; EDGE of ops/fake_quantize.py.
constexpr float kEdge = 0.5f + 1.0f / 1024.0f;

struct Grid {
  float scale, zero;      // the code of 0.0, rounded
  float first, last;      // the end codes
  float low, high;        // the open interval of values that have a code of their own
};

// Without a zero point a -0.0 stays one; adding 0.0 would lose it.
template <bool kZero>
inline float code_of(float x, const Grid& grid) {
  float code = round_even(x / grid.scale);
  if (kZero) return clamp(code + grid.zero, grid.first, grid.last) - grid.zero;
  return clamp(code, grid.first, grid.last);
}

// At a NaN both comparisons are false: it is not outside.
inline bool outside(float x, const Grid& grid) { return (x <= grid.low) | (x >= grid.high); }

// Scales and zero points of a tensor. `kind` of zero points: 0 none, 1 float32, 2 int32.
struct Parameters {
  const float* scale;
  const void* zero;
  int32_t kind;
  float first, last;

  Grid at(int64_t channel) const {
    Grid grid{scale[channel], 0.0f, first, last, 0.0f, 0.0f};
    if (kind == 1) grid.zero = round_even(static_cast<const float*>(zero)[channel]);
    if (kind == 2) grid.zero = static_cast<float>(static_cast<const int32_t*>(zero)[channel]);
    grid.low = (first - grid.zero - kEdge) * grid.scale;
    grid.high = (last - grid.zero + kEdge) * grid.scale;
    return grid;
  }
};

// Calls body(begin, end, channel) for the runs of one channel between two flat positions.
template <typename Body>
inline void walk(int64_t begin, int64_t end, int64_t channels, int64_t inner, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / inner;
    const int64_t stop = (row + 1) * inner < end ? (row + 1) * inner : end;
    body(begin, stop, row % channels);
    begin = stop;
  }
}

}  // namespace qat
