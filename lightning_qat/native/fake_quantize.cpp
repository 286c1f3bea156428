// Fake quantization, its gradients and the extremes of what it reads: one pass over memory each, with the bits of the
// definitions in ops/fake_quantize.py. Sums are of fixed pieces in float64, so that they do not depend on the threads.
#include <cfloat>

#include "fake_quantize.h"

using namespace qat;

namespace {

constexpr int kLanes = 16;
// Terms are summed in float32 over this many in each lane at most, and from there in float64.
constexpr int64_t kRun = 64 * kLanes;
// Elements of a piece of a sum over a tensor with one scale.
constexpr int64_t kPiece = 16384;

template <bool kZero, typename T>
void quantize_run(const T* __restrict x, T* __restrict y, int64_t count, const Grid grid) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    ask_ahead(x + i);
    for (int j = 0; j < kLanes; ++j) store(y[i + j], code_of<kZero>(load(x[i + j]), grid) * grid.scale);
  }
  for (; i < count; ++i) store(y[i], code_of<kZero>(load(x[i]), grid) * grid.scale);
}

// In which every element has the scale of its column.
template <bool kZero, typename T>
void quantize_columns(const T* x, T* y, int64_t rows, int64_t columns, const Parameters& all) {
  Grid grids[kLanes];
  for (int64_t start = 0; start < columns; start += kLanes) {
    const int64_t width = columns - start < kLanes ? columns - start : kLanes;
    for (int64_t j = 0; j < width; ++j) grids[j] = all.at(start + j);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = r * columns + start;
      for (int64_t j = 0; j < width; ++j) {
        store(y[at + j], code_of<kZero>(load(x[at + j]), grids[j]) * grids[j].scale);
      }
    }
  }
}

template <bool kZero, typename T>
void quantize(const T* x, T* y, int64_t outer, int64_t channels, int64_t inner, const Parameters& all, int32_t threads) {
  const int64_t count = outer * channels * inner;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    if (inner == 1 && channels > 1) {
      const int64_t first = share(outer, part, threads), last = share(outer, part + 1, threads);
      quantize_columns<kZero>(x + first * channels, y + first * channels, last - first, channels, all);
    } else {
      walk(share(count, part, threads), share(count, part + 1, threads), channels, inner,
           [&](int64_t b, int64_t e, int64_t c) { quantize_run<kZero>(x + b, y + b, e - b, all.at(c)); });
    }
  }
}

template <typename T>
void input_gradient_run(const T* grad, const T* __restrict x, T* to, int64_t count, Grid grid) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) store_unless(outside(load(x[i]), grid), to[i], grad[i]);
}

template <typename T>
void input_gradient(const T* grad, const T* x, T* to, int64_t outer, int64_t channels, int64_t inner,
                    const Parameters& all, int32_t threads) {
  const int64_t count = outer * channels * inner;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    walk(share(count, part, threads), share(count, part + 1, threads), channels, inner,
         [&](int64_t b, int64_t e, int64_t c) { input_gradient_run(grad + b, x + b, to + b, e - b, all.at(c)); });
  }
}

struct Sums {
  double scale, zero;
};

// LSQ's and LSQ+'s terms of up to kRun elements, and the gradient of x, `to`, which may be `grad`; the fake-quantized x
// where `values` is given.
template <bool kZero, bool kMakes, typename T>
void learn_run(const T* grad, const T* __restrict x, T* to, T* __restrict values, int64_t count, Grid grid, Sums& sums) {
  float of_scale[kLanes] = {}, of_zero[kLanes] = {};
  auto lane = [&](int64_t i, int j) {
    const float value = load(x[i]), g = load(grad[i]);
    const float ratio = value / grid.scale;
    float code = round_even(ratio);
    code = kZero ? clamp(code + grid.zero, grid.first, grid.last) - grid.zero : clamp(code, grid.first, grid.last);
    const bool out = outside(value, grid);
    of_scale[j] += g * (out ? code : code - ratio);
    if (kZero) of_zero[j] += out ? -grid.scale * g : 0.0f;
    if (kMakes) store(values[i], code * grid.scale);
    store_unless(out, to[i], grad[i]);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    ask_ahead(x + i);
    ask_ahead(grad + i);
    if (kMakes) ask_ahead_to_write(values + i);
#pragma GCC ivdep
    for (int j = 0; j < kLanes; ++j) lane(i + j, j);
  }
  for (int j = 0; i < count; ++i, ++j) lane(i, j);
  for (int j = 0; j < kLanes; ++j) {
    sums.scale += of_scale[j];
    sums.zero += of_zero[j];
  }
}

template <bool kZero, typename T>
Sums learn_runs(const T* grad, const T* x, T* to, T* values, int64_t begin, int64_t end, const Grid& grid) {
  Sums sums{0.0, 0.0};
  T unread[kRun];  // with nothing to write GCC 12 makes no vectors of it: ten times as slow
  for (; begin < end; begin += kRun) {
    const int64_t count = end - begin < kRun ? end - begin : kRun;
    const T *g = grad + begin, *v = x + begin;
    T* target = to ? to + begin : unread;
    if (values) learn_run<kZero, true>(g, v, target, values + begin, count, grid, sums);
    else learn_run<kZero, false>(g, v, target, values, count, grid, sums);
  }
  return sums;
}

// The gradient of an exponent, of that of its scale: exponent_gradient of quantizers/scale_gradients.py.
inline float exponent_gradient(double of_scale, float factor, float scale) {
  uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  bits &= 0x7f800000u;  // the power of two below it
  float slope;
  std::memcpy(&slope, &bits, 4);
  return static_cast<float>(of_scale) * factor / slope;
}

// `sums` has two numbers for each row, [outer * channels, 2]; a single row has them for each kPiece of its elements,
// and those of all in the end where the first piece's were. `exponents` may have one number for each row.
template <bool kZero, typename T>
void learn(const T* grad, const T* x, T* to, T* values, int64_t rows, int64_t channels, int64_t inner,
           const Parameters& all, Sums* sums, float factor, float* exponents, int32_t threads) {
  const bool single = rows == 1;
  const int64_t length = single ? kPiece : inner, count = rows * inner;
  const int64_t pieces = single ? (inner + kPiece - 1) / kPiece : rows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * length, end = begin + length < count ? begin + length : count;
    sums[piece] = learn_runs<kZero>(grad, x, to, values, begin, end, all.at(single ? 0 : piece % channels));
  }
  for (int64_t piece = 1; single && piece < pieces; ++piece) {
    sums[0].scale += sums[piece].scale;
    sums[0].zero += sums[piece].zero;
  }
  for (int64_t row = 0; exponents && row < rows; ++row) {
    exponents[row] = exponent_gradient(sums[row].scale, factor, all.scale[row % channels]);
  }
}

struct Extremes {
  float low, high;
  bool has_nan;
};

// Quantizes where values or codes, counted from the first, are asked for.
template <bool kQuantizes, bool kZero, bool kCodes = false, bool kValues = true, typename T>
Extremes observe_run(const T* __restrict x, T* __restrict y, int64_t count, const Grid grid,
                     uint8_t* __restrict codes = nullptr) {
  float low[kLanes], high[kLanes];
  int32_t bad[kLanes] = {}, wide[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    low[j] = INFINITY;
    high[j] = -INFINITY;
  }
  auto lane = [&](int64_t i, int j) {
    const float value = load(x[i]);
    low[j] = value < low[j] ? value : low[j];
    high[j] = value > high[j] ? value : high[j];
    bad[j] |= value != value;
    if (kQuantizes) {
      const float code = code_of<kZero>(value, grid);
      if (kValues) store(y[i], code * grid.scale);
      if (kCodes) wide[j] = static_cast<int32_t>(code + (grid.zero - grid.first));
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    ask_ahead(x + i);
    for (int j = 0; j < kLanes; ++j) lane(i + j, j);
    if (kCodes) {  // once all are known: one instruction makes bytes of them
      for (int j = 0; j < kLanes; ++j) codes[i + j] = static_cast<uint8_t>(wide[j]);
    }
  }
  for (int j = 0; i < count; ++i, ++j) {
    lane(i, j);
    if (kCodes) codes[i] = static_cast<uint8_t>(wide[j]);
  }
  Extremes all{low[0], high[0], bad[0] != 0};
  for (int j = 1; j < kLanes; ++j) {
    all.low = low[j] < all.low ? low[j] : all.low;
    all.high = high[j] > all.high ? high[j] : all.high;
    all.has_nan |= bad[j] != 0;
  }
  return all;
}

inline void write(const Extremes& found, float& low, float& high) {
  low = found.has_nan ? NAN : found.low;
  high = found.has_nan ? NAN : found.high;
}

// Makes the first pair that of all; NaN where one is.
inline void merge(float* bounds, int32_t threads) {
  for (int32_t part = 1; part < threads; ++part) {
    const float low = bounds[2 * part], high = bounds[2 * part + 1];
    if (bounds[0] != bounds[0]) return;
    bounds[0] = low != low || low < bounds[0] ? low : bounds[0];
    bounds[1] = high != high || high > bounds[1] ? high : bounds[1];
  }
}

// `bounds` has a pair for each thread.
template <bool kQuantizes, bool kZero, typename T>
void observe(const T* x, T* y, int64_t count, const Grid& grid, float* bounds, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t begin = share(count, part, threads), end = share(count, part + 1, threads);
    const Extremes found = observe_run<kQuantizes, kZero>(x + begin, y + (kQuantizes ? begin : 0), end - begin, grid);
    write(found, bounds[2 * part], bounds[2 * part + 1]);
  }
  merge(bounds, threads);
}

// Elements of a block that is looked through again where its extremes lie outside.
constexpr int64_t kBlock = 4096;

// Quantizes what lies between two positions and lists those outside, up to `capacity`; -1 where there are more.
template <bool kZero, typename T>
int64_t quantize_input_part(const T* x, T* y, uint8_t* codes, int64_t begin, int64_t end, const Grid& grid,
                            int64_t* positions, int64_t capacity, float& low, float& high) {
  Extremes all{INFINITY, -INFINITY, false};
  int64_t listed = 0;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t stop = start + kBlock < end ? start + kBlock : end;
    const Extremes found =
        !y      ? observe_run<true, kZero, true, false>(x + start, y, stop - start, grid, codes + start)
        : codes ? observe_run<true, kZero, true>(x + start, y + start, stop - start, grid, codes + start)
                : observe_run<true, kZero>(x + start, y + start, stop - start, grid);
    all.low = found.low < all.low ? found.low : all.low;
    all.high = found.high > all.high ? found.high : all.high;
    all.has_nan |= found.has_nan;
    if (listed < 0 || !(outside(found.low, grid) || outside(found.high, grid))) continue;
    for (int64_t i = start; i < stop && listed >= 0; ++i) {
      if (!outside(load(x[i]), grid)) continue;
      if (listed < capacity) positions[listed++] = i;
      else listed = -1;
    }
  }
  write(all, low, high);
  return listed;
}

// Of an input with one scale. `bounds` and `counts` have a pair and a number for each thread, `positions` `capacity` of
// each; the first pair, the first number and the first positions are those of all in the end.
template <bool kZero, typename T>
void quantize_input(const T* x, T* y, uint8_t* codes, int64_t count, const Grid& grid, float* bounds,
                    int64_t* positions, int64_t capacity, int64_t* counts, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    counts[part] = quantize_input_part<kZero>(x, y, codes, share(count, part, threads),
                                              share(count, part + 1, threads), grid, positions + part * capacity,
                                              capacity, bounds[2 * part], bounds[2 * part + 1]);
  }
  merge(bounds, threads);
  for (int32_t part = 1; part < threads; ++part) {
    if (counts[0] < 0 || counts[part] < 0) {
      counts[0] = -1;
      return;
    }
    std::memmove(positions + counts[0], positions + part * capacity, counts[part] * sizeof(int64_t));
    counts[0] += counts[part];
  }
}

template <typename T>
void values_of_codes(const uint8_t* codes, T* y, int64_t count, const Grid& grid, int32_t threads) {
  const float first = grid.first - grid.zero, scale = grid.scale;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t end = share(count, part + 1, threads);
    for (int64_t i = share(count, part, threads); i < end; ++i) {
      store(y[i], (static_cast<float>(codes[i]) + first) * scale);
    }
  }
}

// Symmetric, with the scale of each row's largest magnitude: scale_of_absmax of ops/affine.py.
template <typename T>
void quantize_by_absmax(const T* x, T* y, int64_t rows, int64_t columns, float* scale, float divisor, float first,
                        float last, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * columns;
    const Extremes found = observe_run<false, false>(from, static_cast<T*>(nullptr), columns, Grid{});
    float absmax = -found.low > found.high ? -found.low : found.high;
    absmax = clamp(absmax, 0.0f, FLT_MAX);
    const float step = absmax / divisor;
    scale[row] = found.has_nan ? NAN : absmax == 0.0f ? 1.0f : step < FLT_MIN ? FLT_MIN : step;
    quantize_run<false>(from, y + row * columns, columns, Grid{scale[row], 0.0f, first, last, 0.0f, 0.0f});
  }
}

template <typename T>
void row_extremes(const T* x, int64_t rows, int64_t columns, float* low, float* high, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    write(observe_run<false, false>(x + row * columns, static_cast<T*>(nullptr), columns, Grid{}), low[row], high[row]);
  }
}

}  // namespace

#define FAMILY(NAME, T)                                                                                               \
  extern "C" void quantize_##NAME(const T* x, T* y, int64_t outer, int64_t channels, int64_t inner,                  \
                                  const float* scale, const void* zero, int32_t kind, float first, float last,       \
                                  int32_t threads) {                                                                 \
    const Parameters all{scale, zero, kind, first, last};                                                            \
    (kind ? quantize<true, T> : quantize<false, T>)(x, y, outer, channels, inner, all, threads);                     \
  }                                                                                                                  \
  extern "C" void input_gradient_##NAME(const T* grad, const T* x, T* to, int64_t outer, int64_t channels,           \
                                        int64_t inner, const float* scale, const void* zero, int32_t kind,           \
                                        float first, float last, int32_t threads) {                                  \
    input_gradient<T>(grad, x, to, outer, channels, inner, Parameters{scale, zero, kind, first, last}, threads);     \
  }                                                                                                                  \
  extern "C" void learn_##NAME(const T* grad, const T* x, T* to, T* values, int64_t outer, int64_t channels,         \
                               int64_t inner, const float* scale, const void* zero, int32_t kind, float first,       \
                               float last, double* sums, float factor, float* exponents, int32_t threads) {          \
    const Parameters all{scale, zero, kind, first, last};                                                            \
    (kind ? learn<true, T> : learn<false, T>)(grad, x, to, values, outer * channels, channels, inner, all,           \
                                              reinterpret_cast<Sums*>(sums), factor, exponents, threads);            \
  }                                                                                                                  \
  extern "C" void observe_##NAME(const T* x, T* y, int64_t count, const float* scale, const void* zero,              \
                                 int32_t kind, float first, float last, float* bounds, int32_t threads) {            \
    if (!y) return observe<false, false, T>(x, y, count, Grid{}, bounds, threads);                                   \
    const Grid grid = Parameters{scale, zero, kind, first, last}.at(0);                                              \
    (kind ? observe<true, true, T> : observe<true, false, T>)(x, y, count, grid, bounds, threads);                   \
  }                                                                                                                  \
  extern "C" void quantize_input_##NAME(const T* x, T* y, uint8_t* codes, int64_t count, const float* scale,         \
                                        const void* zero, int32_t kind, float first, float last, float* bounds,      \
                                        int64_t* positions, int64_t capacity, int64_t* counts, int32_t threads) {    \
    const Grid grid = Parameters{scale, zero, kind, first, last}.at(0);                                              \
    (kind ? quantize_input<true, T> : quantize_input<false, T>)(x, y, codes, count, grid, bounds, positions,         \
                                                                capacity, counts, threads);                          \
  }                                                                                                                  \
  extern "C" void values_of_codes_##NAME(const uint8_t* codes, T* y, int64_t count, const float* scale,              \
                                         const void* zero, int32_t kind, float first, float last, int32_t threads) { \
    values_of_codes<T>(codes, y, count, Parameters{scale, zero, kind, first, last}.at(0), threads);                  \
  }                                                                                                                  \
  extern "C" void quantize_by_absmax_##NAME(const T* x, T* y, int64_t rows, int64_t columns, float* scale,           \
                                            float divisor, float first, float last, int32_t threads) {               \
    quantize_by_absmax<T>(x, y, rows, columns, scale, divisor, first, last, threads);                                \
  }                                                                                                                  \
  extern "C" void row_extremes_##NAME(const T* x, int64_t rows, int64_t columns, float* low, float* high,            \
                                      int32_t threads) {                                                             \
    row_extremes<T>(x, rows, columns, low, high, threads);                                                           \
  }

// The scales that exponents stand for: scale_of of quantizers/exponents.py. `wrong` is 1 where one is outside of
// least .. most, NaN among them.
extern "C" void scales_of_exponents(const float* exponents, int64_t count, float least, float most, float* scale,
                                    int32_t* wrong) {
  bool right = true;
  for (int64_t i = 0; i < count; ++i) {
    const bool fits = exponents[i] >= least && exponents[i] <= most;
    const int32_t bits = static_cast<int32_t>((fits ? exponents[i] : 0.0f) * 8388608.0f) + 0x3f800000;
    std::memcpy(scale + i, &bits, 4);
    right = right && fits;
  }
  *wrong = !right;
}

FAMILY(float32, float)
FAMILY(bfloat16, BFloat16)
#if defined(HALVES)
FAMILY(float16, _Float16)
#endif
