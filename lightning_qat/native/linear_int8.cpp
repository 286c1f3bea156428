// Inputs to unsigned codes, and few rows of codes times int8 weights: the bits of ops/integer_linear.py.
#include "arithmetic.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(QAT_PLAIN)
#define QAT_VNNI 1
#include <immintrin.h>
#endif

using qat::clamp;
using qat::round_even;
using qat::share;

// Sums in an array stay in registers only where the loops over it are gone.
#define QAT_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr float kLargest = 3.402823466e38f, kTiny = 1.175494351e-38f;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the code stays in the lowest byte

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float of_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// As integers, magnitudes have the order of floats, and NaN comes above infinity; so compilers use vectors.
float absmax_of(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = bits_of(x[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return of_bits(most);
}

// A key that orders negative numbers too; it is its own inverse.
int32_t key_of(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

struct Range {
  int32_t least = INT32_MAX, most = INT32_MIN, largest = 0;  // keys, and the bits of the largest magnitude

  void add(const float* x, int64_t count) {
    int32_t low = least, high = most, magnitude = largest;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t bits = bits_of(x[i]), key = key_of(bits), positive = bits & 0x7fffffff;
      low = key < low ? key : low;
      high = key > high ? key : high;
      magnitude = positive > magnitude ? positive : magnitude;
    }
    least = low, most = high, largest = magnitude;
  }
};

// The scale of choose_scale_zero_point for a symmetric range; `divisor` is the largest code, or half a step more.
float symmetric_scale(float absmax, float divisor) {
  const float scale = clamp(absmax, 0.0f, kLargest) / divisor;
  return absmax == 0.0f ? 1.0f : (scale < kTiny ? kTiny : scale);
}

float asymmetric_scale(const Range& range, float quant_max, int32_t* zero) {
  const bool has_nan = range.largest > 0x7f800000;  // as torch.aminmax, which then returns NaN
  const float low = clamp(has_nan ? NAN : of_bits(key_of(range.least)), -kLargest, 0.0f);
  const float high = clamp(has_nan ? NAN : of_bits(key_of(range.most)), 0.0f, kLargest);
  float scale = high / quant_max - low / quant_max;
  scale = high == low ? 1.0f : (scale < kTiny ? kTiny : scale);
  const float code = clamp(round_even(-low / scale), 0.0f, quant_max);
  *zero = code != code ? 0 : static_cast<int32_t>(code);
  return scale;
}

void to_codes(const float* __restrict x, int64_t count, float scale, int32_t zero, float low, float high,
              uint8_t* __restrict codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = clamp(x[i] / scale, low, high) + kRounder;
    codes[i] = static_cast<uint8_t>((shifted != shifted ? 0 : bits_of(shifted)) + zero);  // NaN: whatever its bits are
  }
}

struct Product {
  const uint8_t* codes;
  int64_t tokens, columns, rows;
  const int8_t* weight;
  const int32_t* sums;
  const float* weight_scale;
  int64_t weight_scales;
  const float* scale;
  const int32_t* zero;
  int32_t per_token;
  const float* bias;
  float* out;

  // One rounding for each step, in the order of the kernel that takes many tokens.
  void store(int64_t token, int64_t row, int32_t sum) const {
    const uint32_t shift = static_cast<uint32_t>(*zero) * static_cast<uint32_t>(sums[row]);
    const float exact = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sum) - shift));
    const float step = weight_scale[weight_scales > 1 ? row : 0];
    float value = per_token ? (exact * step) * scale[token] : exact * (*scale * step);
    if (bias) value = value + bias[row];
    out[token * rows + row] = value;
  }
};

#ifdef QAT_VNNI

// kRows rows of the weight with kTokens tokens: sums stay in registers, each load is used several times.
template <int kRows, int kTokens, bool kAhead = true>
void tile(const Product& p, int64_t row, int64_t token) {
  const int8_t* weight = p.weight + row * p.columns;
  const uint8_t* codes = p.codes + token * p.columns;
  __m512i sums[kRows][kTokens];
  QAT_UNROLL
  for (int r = 0; r < kRows; ++r)
    QAT_UNROLL
    for (int t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= p.columns; k += 64) {
    __m512i w[kRows];
    QAT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      w[r] = _mm512_loadu_si512(weight + r * p.columns + k);
      // The rows of the next tile: each row is a page or so, too short for the processor to look ahead itself.
      if (kAhead) __builtin_prefetch(weight + (kRows + r) * p.columns + k);
    }
    QAT_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const __m512i x = _mm512_loadu_si512(codes + t * p.columns + k);
      QAT_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], x, w[r]);
    }
  }
  if (k < p.columns) {
    const __mmask64 rest = ~0ull >> (64 - (p.columns - k));
    QAT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512i w = _mm512_maskz_loadu_epi8(rest, weight + r * p.columns + k);
      QAT_UNROLL
      for (int t = 0; t < kTokens; ++t)
        sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], _mm512_maskz_loadu_epi8(rest, codes + t * p.columns + k), w);
    }
  }
  QAT_UNROLL
  for (int r = 0; r < kRows; ++r)
    QAT_UNROLL
    for (int t = 0; t < kTokens; ++t) p.store(token + t, row + r, _mm512_reduce_add_epi32(sums[r][t]));
}

constexpr int64_t kTileRows = 4, kTileTokens = 6;

template <int kRows>
void tokens_of(const Product& p, int64_t row) {
  const int64_t parts = (p.tokens + kTileTokens - 1) / kTileTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t token = share(p.tokens, part, parts);
    switch (share(p.tokens, part + 1, parts) - token) {
      case 1: tile<kRows, 1>(p, row, token); break;
      case 2: tile<kRows, 2>(p, row, token); break;
      case 3: tile<kRows, 3>(p, row, token); break;
      case 4: tile<kRows, 4>(p, row, token); break;
      case 5: tile<kRows, 5>(p, row, token); break;
      default: tile<kRows, 6>(p, row, token);
    }
  }
}

void multiply(const Product& p, int64_t begin, int64_t end) {
  int64_t row = begin;
  // Read side by side, more rows keep the memory busier: 0.50 ms of two cores where four rows take 0.56. AMD's look
  // ahead by themselves along eight rows, and asking besides is in the way: 68 GB/s with it, 84 without.
  static const bool alone = __builtin_cpu_is("amd");
  if (p.tokens == 1)
    for (; row + 2 * kTileRows <= end; row += 2 * kTileRows)
      alone ? tile<2 * kTileRows, 1, false>(p, row, 0) : tile<2 * kTileRows, 1>(p, row, 0);
  for (; row + kTileRows <= end; row += kTileRows) tokens_of<kTileRows>(p, row);
  for (; row < end; ++row) tokens_of<1>(p, row);
}

#else

void multiply(const Product& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t token = 0; token < p.tokens; ++token) {
      const int8_t* weight = p.weight + row * p.columns;
      const uint8_t* codes = p.codes + token * p.columns;
      int32_t sum = 0;
      for (int64_t k = 0; k < p.columns; ++k) sum += static_cast<int32_t>(codes[k]) * static_cast<int32_t>(weight[k]);
      p.store(token, row, sum);
    }
}

#endif

}  // namespace

// On the grid that is given: one scale, codes around `zero` clamped to `low .. high` relative to it.
extern "C" void linear_quantize(const float* x, int64_t count, float scale, int32_t zero, float low, float high,
                                uint8_t* codes, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t begin = share(count, part, threads), end = share(count, part + 1, threads);
    to_codes(x + begin, end - begin, scale, zero, low, high, codes + begin);
  }
}

// On the grid of the range of all: `scale` and `zero` are one each. Symmetric codes, where `quant_min` is negative,
// lie around 128.
extern "C" void linear_quantize_tensor(const float* x, int64_t count, float quant_min, float quant_max, float divisor,
                                       float* scale, int32_t* zero, uint8_t* codes, int32_t threads) {
  int32_t least = INT32_MAX, most = INT32_MIN, largest = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : least) reduction(max : most, largest)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t begin = share(count, part, threads), end = share(count, part + 1, threads);
    Range range;
    range.add(x + begin, end - begin);
    least = range.least < least ? range.least : least;
    most = range.most > most ? range.most : most;
    largest = range.largest > largest ? range.largest : largest;
  }
  const bool symmetric = quant_min < 0.0f;
  *zero = 128;
  *scale = symmetric ? symmetric_scale(of_bits(largest), divisor)
                     : asymmetric_scale(Range{least, most, largest}, quant_max, zero);
  const float shift = symmetric ? 0.0f : static_cast<float>(*zero);
  linear_quantize(x, count, *scale, *zero, quant_min - shift, quant_max - shift, codes, threads);
}

// Every token on a symmetric grid of its own.
extern "C" void linear_quantize_tokens(const float* x, int64_t tokens, int64_t columns, float quant_min, float quant_max,
                                       float divisor, float* scale, uint8_t* codes, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < tokens; ++token) {
    scale[token] = symmetric_scale(absmax_of(x + token * columns, columns), divisor);
    to_codes(x + token * columns, columns, scale[token], 128, quant_min, quant_max, codes + token * columns);
  }
}

extern "C" void linear_multiply(const uint8_t* codes, int64_t tokens, int64_t columns, const int8_t* weight,
                                int64_t rows, const int32_t* sums, const float* weight_scale, int64_t weight_scales,
                                const float* scale, const int32_t* zero, int32_t per_token, const float* bias,
                                float* out, int32_t threads) {
  const Product product{codes, tokens, columns, rows, weight, sums, weight_scale, weight_scales,
                        scale, zero,   per_token, bias, out};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part)
    multiply(product, share(rows, part, threads), share(rows, part + 1, threads));
}

// Whether this processor has instructions for it: plain loops took 2.7 ms a token where they take 0.9 for one and 1.7
// for eight, 4096 x 4096.
extern "C" void linear_int8_vectors(int32_t* found) {
#ifdef QAT_VNNI
  *found = 1;
#else
  *found = 0;
#endif
}

namespace {

constexpr int64_t kMostOnStack = 48 * 1024;

// What stays the same from call to call, as native/linear_int8.py fills it in.
struct Prepared {
  int64_t columns, rows;
  const int8_t* weight;
  const int32_t* sums;
  const float* weight_scale;
  int64_t weight_scales;
  float quant_min, quant_max, divisor, scale;  // relative to the zero point where the grid is given
  int32_t zero, grid;                          // 0: given, 1: of the range of all, 2: of each token's range
};

}  // namespace

// Quantization and product at once, for few tokens. `scratch` holds a scale and the codes of each token; where they
// fit on the stack it is not asked for.
extern "C" void linear_of_tokens(const float* x, int64_t tokens, const void* prepared, const float* bias, void* scratch,
                                 float* out, int32_t threads) {
  const auto& p = *static_cast<const Prepared*>(prepared);
  alignas(64) uint8_t held[kMostOnStack + 4];  // the scales begin at a multiple of four
  if (tokens * (p.columns + 4) <= kMostOnStack) scratch = held;
  auto* codes = static_cast<uint8_t*>(scratch);
  auto* scale = reinterpret_cast<float*>(codes + (tokens * p.columns + 3) / 4 * 4);
  int32_t zero = p.zero;
  *scale = p.scale;
  if (p.grid == 0) to_codes(x, tokens * p.columns, p.scale, zero, p.quant_min, p.quant_max, codes);
  if (p.grid == 1)
    linear_quantize_tensor(x, tokens * p.columns, p.quant_min, p.quant_max, p.divisor, scale, &zero, codes, 1);
  if (p.grid == 2)
    linear_quantize_tokens(x, tokens, p.columns, p.quant_min, p.quant_max, p.divisor, scale, codes, 1);
  linear_multiply(codes, tokens, p.columns, p.weight, p.rows, p.sums, p.weight_scale, p.weight_scales, scale, &zero,
                  p.grid == 2, bias, out, threads);
}
