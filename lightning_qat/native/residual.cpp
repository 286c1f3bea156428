// Two float tensors added, clamped and quantized in one pass: what ops/residual.py defines.
#include "arithmetic.h"

using qat::clamp;

namespace {

// Elements a thread takes at a time: what it reads and writes of them stays in the first cache between the two loops.
constexpr int64_t kPiece = 2048;

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the code stays in the lowest byte

// `out` may be `left` or `right`; NaN stays NaN.
void add(const float* left, const float* right, int64_t count, float low, float high, float* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = clamp(left[i] + right[i], low, high);
}

// Clamping before rounding is the same between whole numbers. A NaN gets the code of zero.
void quantize(const float* __restrict x, int64_t count, float scale, int32_t zero, float first, float last,
              uint8_t* __restrict codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = clamp(x[i] / scale, first, last) + kRounder;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    codes[i] = static_cast<uint8_t>((shifted != shifted ? 0 : bits) + zero);
  }
}

}  // namespace

// `codes` may be null; `first` and `last` are the smallest and the largest code less that of zero.
extern "C" void residual_add(const float* left, const float* right, int64_t count, float low, float high, float* out,
                             uint8_t* codes, float scale, int32_t zero, float first, float last, int32_t threads) {
  const int64_t pieces = (count + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t at = piece * kPiece, n = count - at < kPiece ? count - at : kPiece;
    add(left + at, right + at, n, low, high, out + at);
    if (codes) quantize(out + at, n, scale, zero, first, last, codes + at);
  }
}
