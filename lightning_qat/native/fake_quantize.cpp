// Fake quantization of float32: one pass over memory, with the bits of the definition in ops/fake_quantize.py.
#include "arithmetic.h"

using qat::clamp;
using qat::round_even;
using qat::share;

namespace {

struct Grid {
  float scale, zero, low, high;  // the code of 0.0, and the end codes
};

// Without a zero point a -0.0 stays one; adding 0.0 would lose it.
template <bool kZero>
inline float on_grid(float x, const Grid& grid) {
  float code = round_even(x / grid.scale);
  if (kZero) code = clamp(code + grid.zero, grid.low, grid.high) - grid.zero;
  else code = clamp(code, grid.low, grid.high);
  return code * grid.scale;
}

template <bool kZero>
void run(const float* x, float* y, int64_t count, const Grid& grid) {
  for (int64_t i = 0; i < count; ++i) y[i] = on_grid<kZero>(x[i], grid);
}

}  // namespace

extern "C" void fake_quantize_tensor(const float* x, float* y, int64_t count, float scale, float zero, int32_t has_zero,
                                     float low, float high, int32_t threads) {
  const Grid grid{scale, zero, low, high};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t begin = share(count, part, threads), end = share(count, part + 1, threads);
    (has_zero ? run<true> : run<false>)(x + begin, y + begin, end - begin, grid);
  }
}
