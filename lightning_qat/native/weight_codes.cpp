// The codes of a weight as products of integers read them: int8, column by column, where the weight lies row by row.
#include <cfloat>
#include <type_traits>

#include "fake_quantize.h"

using namespace qat;

namespace {

constexpr int64_t kSide = 16;  // rows and columns that are transposed together
using Bytes = uint8_t __attribute__((vector_size(kSide)));

// As quantize_by_absmax of fake_quantize.cpp. Bits of magnitudes have the order of floats, NaN comes above infinity.
float scale_of_row(const float* x, int64_t columns, float divisor) {
  int32_t most = 0;
  for (int64_t k = 0; k < columns; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float absmax;
  std::memcpy(&absmax, &most, 4);
  const float step = clamp(absmax, 0.0f, FLT_MAX) / divisor;
  return most > 0x7f800000 ? NAN : most == 0 ? 1.0f : step < FLT_MIN ? FLT_MIN : step;
}

// Returns whether there is a NaN.
template <class Width>
inline bool write_codes(const float* from, Width width, const Grid& grid, uint8_t* to) {
  int32_t bad = 0, wide[kSide] = {};
  for (int64_t i = 0; i < width; ++i) {
    const float code = code_of<false>(from[i], grid);
    bad |= code != code;
    wide[i] = static_cast<int32_t>(code != code ? 0.0f : code);
  }
  for (int64_t i = 0; i < kSide; ++i) to[i] = static_cast<uint8_t>(wide[i]);
  return bad != 0;
}

// Rows that lie half the side apart, byte by byte, four times: each byte has then moved from row to column.
inline void transpose(Bytes rows[kSide]) {
  constexpr Bytes kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Bytes kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int round = 0; round < 4; ++round) {
    Bytes next[kSide];
    for (int i = 0; i < kSide / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kSide / 2], kLow);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kSide / 2], kHigh);
    }
    std::memcpy(rows, next, sizeof(next));
  }
}

// 16 rows at a time, 16 columns of each. Returns whether there is a NaN.
bool write_rows(const float* weight, int64_t rows, int64_t columns, int64_t first, int64_t lanes, const float* scale,
                int64_t scales, float low, float high, int8_t* out) {
  bool has_nan = false;
  for (int64_t k = 0; k < columns; k += kSide) {
    const int64_t width = columns - k < kSide ? columns - k : kSide;
    Bytes block[kSide] = {};
    for (int64_t r = 0; r < lanes; ++r) {
      const float* from = weight + (first + r) * columns + k;
      const Grid grid{scale[scales > 1 ? first + r : 0], 0.0f, low, high, 0.0f, 0.0f};
      uint8_t codes[kSide];
      // A width that the compiler knows is one vector.
      has_nan |= width == kSide ? write_codes(from, std::integral_constant<int64_t, kSide>(), grid, codes)
                                : write_codes(from, width, grid, codes);
      std::memcpy(&block[r], codes, kSide);
    }
    transpose(block);
    for (int64_t i = 0; i < width; ++i) std::memcpy(out + (k + i) * rows + first, &block[i], lanes);
  }
  return has_nan;
}

}  // namespace

// With a divisor the scales are found first, each of its row's largest magnitude; otherwise they are given. `nans` is
// not 0 where a weight or a scale is NaN: its codes mean nothing.
extern "C" void weight_codes(const float* weight, int64_t rows, int64_t columns, float* scale, int64_t scales,
                             float divisor, float low, float high, int8_t* out, int32_t* nans, int32_t threads) {
  const int64_t tiles = (rows + kSide - 1) / kSide;
  int32_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kSide, lanes = rows - first < kSide ? rows - first : kSide;
    if (divisor > 0.0f)
      for (int64_t r = first; r < first + lanes; ++r) scale[r] = scale_of_row(weight + r * columns, columns, divisor);
    bad |= write_rows(weight, rows, columns, first, lanes, scale, scales, low, high, out);
  }
  *nans = bad;
}
