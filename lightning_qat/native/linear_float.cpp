// Few float rows times weights in 4 or 8 bits, read as they are stored; a weight is `(code - zero) * scale` in float32.
#include "arithmetic.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(QAT_PLAIN)
#define QAT_VECTORS 1
#include <immintrin.h>
#endif

using qat::share;

// Sums in an array stay in registers only where the loops over it are gone. What is not meant to be fast is not
// unrolled: it took the compiler two minutes.
#ifdef QAT_VECTORS
#define QAT_UNROLL _Pragma("GCC unroll 16")
#define QAT_TILE(rows, tokens) static constexpr int kMostRows = rows, kMostTokens = tokens;
#define QAT_FEW_ROWS 4
#else
#define QAT_UNROLL
#define QAT_FEW_ROWS 1
#define QAT_TILE(rows, tokens) static constexpr int kMostRows = 1, kMostTokens = 1;
#endif

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 128;  // 4-bit codes of a vector: eight to each lane

struct Lanes;

struct Product {
  const float* x;  // arranged, `padded` to a token
  int64_t tokens, columns, padded, rows;
  const uint8_t* weight;
  const float* table;  // what the 16 codes stand for
  const float* scale;
  const float* zero;  // or null
  int64_t groups, size;
  const Lanes* lanes;  // of each block, where it holds several groups
  const float* bias;
  float* out;

  void store(int64_t token, int64_t row, float sum) const {
    out[token * rows + row] = bias ? sum + bias[row] : sum;
  }
};

#ifdef QAT_VECTORS

using Vector = __m512;
inline Vector zeros() { return _mm512_setzero_ps(); }
inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Vector load(const float* x) { return _mm512_loadu_ps(x); }
inline Vector add_product(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Vector minus(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector times(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }

using Words = __m512i;
inline Words load_words(const uint8_t* bytes, int64_t count) {
  if (count >= 64) return _mm512_loadu_si512(bytes);
  return _mm512_maskz_loadu_epi8((1ull << count) - 1, bytes);
}
inline Vector look_up(Words words, Vector table) { return _mm512_permutexvar_ps(words, table); }
inline Words next_code(Words words) { return _mm512_srli_epi32(words, 4); }
// One number for each lane, of `count` neighbours. Two and four, of groups of 64 and 32, are read without a mask: a
// product of one token took 0.25 ms where it took 0.30.
inline Vector spread(const float* x, int64_t count, const int32_t* lanes) {
  const __m512i index = _mm512_loadu_si512(lanes);
  if (count == 2) {
    double two;
    std::memcpy(&two, x, 8);
    return _mm512_permutexvar_ps(index, _mm512_castpd_ps(_mm512_set1_pd(two)));
  }
  if (count == 4) return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x4(_mm_loadu_ps(x)));
  const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
  return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(some, x));
}
inline Vector load_codes(const int8_t* codes, int64_t count) {
  const __m128i bytes = count >= kLanes ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))
                                        : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), codes);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

#else

struct Vector {
  float lane[kLanes];
};
struct Words {
  uint32_t lane[kLanes];
};

template <typename Function>
inline Vector each(Function function) {
  Vector result;
  for (int64_t i = 0; i < kLanes; ++i) result.lane[i] = function(i);
  return result;
}
inline Vector all(float x) {
  return each([=](int64_t) { return x; });
}
inline Vector zeros() { return all(0.0f); }
inline Vector load(const float* x) {
  return each([=](int64_t i) { return x[i]; });
}
inline Vector add_product(const Vector& a, const Vector& b, const Vector& sum) {
  return each([&](int64_t i) { return sum.lane[i] + a.lane[i] * b.lane[i]; });
}
inline Vector minus(const Vector& a, const Vector& b) {
  return each([&](int64_t i) { return a.lane[i] - b.lane[i]; });
}
inline Vector times(const Vector& a, const Vector& b) {
  return each([&](int64_t i) { return a.lane[i] * b.lane[i]; });
}
inline float sum_of(Vector x) {
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) x.lane[i] += x.lane[i + half];
  return x.lane[0];
}
inline Words load_words(const uint8_t* bytes, int64_t count) {
  Words words;
  for (int64_t i = 0; i < kLanes; ++i) {
    words.lane[i] = 0;
    for (int64_t j = 0; j < 4; ++j)  // whatever byte comes first in this machine's numbers
      if (4 * i + j < count) words.lane[i] |= static_cast<uint32_t>(bytes[4 * i + j]) << (8 * j);
  }
  return words;
}
inline Vector look_up(const Words& words, const Vector& table) {
  return each([&](int64_t i) { return table.lane[words.lane[i] & 15]; });
}
inline Words next_code(Words words) {
  for (int64_t i = 0; i < kLanes; ++i) words.lane[i] >>= 4;
  return words;
}
inline Vector spread(const float* x, int64_t, const int32_t* lanes) {
  return each([=](int64_t i) { return x[lanes[i]]; });
}
inline Vector load_codes(const int8_t* codes, int64_t count) {
  return each([=](int64_t i) { return i < count ? static_cast<float>(codes[i]) : 0.0f; });
}

#endif

// --- 4 bits -----------------------------------------------------------------------------------------

// Lane `i` of vector `s` of a block holds what code `s` of word `i` multiplies; `flip` is 1 where the high half of a
// byte comes first.
void arrange(const float* x, int64_t columns, int64_t padded, int64_t flip, float* out) {
  for (int64_t begin = 0; begin < padded; begin += kBlock)
    for (int64_t s = 0; s < 8; ++s)
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t k = begin + 8 * i + (s ^ flip);
        out[begin + s * kLanes + i] = k < columns ? x[k] : 0.0f;
      }
}

// Groups that lie in a block: the first, how many, and that of each lane less the first.
struct Lanes {
  int32_t first, count;
  int32_t group[kLanes];
};
static_assert(sizeof(Lanes) == 18 * sizeof(float), "scratch memory is counted in floats");

void find_lanes(int64_t columns, int64_t size, Lanes* lanes) {
  for (int64_t begin = 0; begin < columns; begin += kBlock, ++lanes) {
    const int64_t end = begin + kBlock < columns ? begin + kBlock : columns, first = begin / size;
    lanes->first = static_cast<int32_t>(first);
    lanes->count = static_cast<int32_t>((end - 1) / size + 1 - first);
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t k = begin + 8 * i < end ? begin + 8 * i : end - 1;
      lanes->group[i] = static_cast<int32_t>(k / size - first);
    }
  }
}

// kWide: a block lies in one group, so that the table is scaled instead of the weights: the very same products. Else
// a lane's eight products are added up before they are scaled: the codes of a word lie in one group.
template <int kRows, int kTokens, bool kWide, bool kZero>
void tile4(const Product& p, int64_t row, int64_t token) {
  const int64_t bytes = p.columns / 2;
  const uint8_t* weight = p.weight + row * bytes;
  const float* x = p.x + token * p.padded;
  const Vector base = load(p.table);
  Vector sums[kRows][kTokens];
  QAT_UNROLL
  for (int r = 0; r < kRows; ++r)
    QAT_UNROLL
    for (int t = 0; t < kTokens; ++t) sums[r][t] = zeros();
  for (int64_t begin = 0; begin < p.columns; begin += kBlock) {
    Words words[kRows];
    Vector table[kRows], scale[kRows], zero[kRows], parts[kRows][kTokens];
    const Lanes& lanes = p.lanes[begin / kBlock];
    const int64_t at = kWide ? begin / p.size : lanes.first;
    QAT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* here = weight + r * bytes + begin / 2;
      words[r] = load_words(here, bytes - begin / 2);
      // The rows of the next tile: each row is half a page, too short for the processor to look ahead itself.
      __builtin_prefetch(here + kRows * bytes);
      const int64_t group = (row + r) * p.groups + at;
      if (kWide) {
        table[r] = kZero ? minus(base, all(p.zero[group])) : base;
        table[r] = times(table[r], all(p.scale[group]));
      } else {
        table[r] = base;
        if (kZero) zero[r] = spread(p.zero + group, lanes.count, lanes.group);
      }
    }
    QAT_UNROLL
    for (int s = 0; s < 8; ++s) {
      Vector w[kRows];
      QAT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        w[r] = look_up(words[r], table[r]);
        if (!kWide && kZero) w[r] = minus(w[r], zero[r]);
        words[r] = next_code(words[r]);
      }
      QAT_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const Vector values = load(x + t * p.padded + begin + s * kLanes);
        QAT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          Vector& sum = kWide ? sums[r][t] : parts[r][t];
          sum = !kWide && s == 0 ? times(w[r], values) : add_product(w[r], values, sum);
        }
      }
    }
    if (kWide) continue;
    QAT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      scale[r] = spread(p.scale + (row + r) * p.groups + at, lanes.count, lanes.group);
      QAT_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[r][t] = add_product(parts[r][t], scale[r], sums[r][t]);
    }
  }
  QAT_UNROLL
  for (int r = 0; r < kRows; ++r)
    QAT_UNROLL
    for (int t = 0; t < kTokens; ++t) p.store(token + t, row + r, sum_of(sums[r][t]));
}

template <bool kZero>
struct Narrow4 {
  QAT_TILE(2, 6)

  template <int kRows, int kTokens>
  static void tile(const Product& p, int64_t row, int64_t token) {
    tile4<kRows, kTokens, false, kZero>(p, row, token);
  }
};

template <bool kZero>
struct Wide4 {
  QAT_TILE(4, 4)

  template <int kRows, int kTokens>
  static void tile(const Product& p, int64_t row, int64_t token) {
    tile4<kRows, kTokens, true, kZero>(p, row, token);
  }
};

// --- 8 bits -----------------------------------------------------------------------------------------

struct Whole8 {
  QAT_TILE(4, 4)

  template <int kRows, int kTokens>
  static void tile(const Product& p, int64_t row, int64_t token) {
    const int8_t* weight = reinterpret_cast<const int8_t*>(p.weight) + row * p.columns;
    const float* x = p.x + token * p.padded;
    Vector sums[kRows][kTokens];
    QAT_UNROLL
    for (int r = 0; r < kRows; ++r)
      QAT_UNROLL
      for (int t = 0; t < kTokens; ++t) sums[r][t] = zeros();
    for (int64_t begin = 0, group = 0; begin < p.columns; begin += p.size, ++group) {
      const int64_t end = begin + p.size;
      Vector scale[kRows];
      QAT_UNROLL
      for (int r = 0; r < kRows; ++r) scale[r] = all(p.scale[(row + r) * p.groups + group]);
      for (int64_t k = begin; k < end; k += kLanes) {
        Vector w[kRows];
        QAT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const int8_t* here = weight + r * p.columns + k;
          w[r] = times(load_codes(here, end - k), scale[r]);
          __builtin_prefetch(here + kRows * p.columns);
        }
        QAT_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const Vector values = load(x + t * p.padded + k);
          QAT_UNROLL
          for (int r = 0; r < kRows; ++r) sums[r][t] = add_product(w[r], values, sums[r][t]);
        }
      }
    }
    QAT_UNROLL
    for (int r = 0; r < kRows; ++r)
      QAT_UNROLL
      for (int t = 0; t < kTokens; ++t) p.store(token + t, row + r, sum_of(sums[r][t]));
  }
};

// --- tiles ------------------------------------------------------------------------------------------

// Tokens whose inputs stay in the cache while all rows go by.
constexpr int64_t kTokensAtOnce = 32;

template <typename Bits, int kRows, int kTokens>
void tile_of(const Product& p, int64_t row, int64_t token, int64_t count) {
  if (count == kTokens) Bits::template tile<kRows, kTokens>(p, row, token);
  else if constexpr (kTokens > 1) tile_of<Bits, kRows, kTokens - 1>(p, row, token, count);
}

// The sum of a row and a token is added up in the same order in every tile.
template <typename Bits, int kRows, int kTokens>
void tokens_of(const Product& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t parts = (end - begin + kTokens - 1) / kTokens;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t token = begin + share(end - begin, part, parts);
    tile_of<Bits, kRows, kTokens>(p, row, token, begin + share(end - begin, part + 1, parts) - token);
  }
}

template <typename Bits, int kRows, int kTokens>
void multiply_tiles(const Product& p, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    const int64_t last = share(p.rows, part + 1, threads);
    for (int64_t begin = 0; begin < p.tokens; begin += kTokensAtOnce) {
      const int64_t end = begin + kTokensAtOnce < p.tokens ? begin + kTokensAtOnce : p.tokens;
      int64_t row = share(p.rows, part, threads);
      for (; row + kRows <= last; row += kRows) tokens_of<Bits, kRows, kTokens>(p, row, begin, end);
      for (; row < last; ++row) tokens_of<Bits, 1, kTokens>(p, row, begin, end);
    }
  }
}

template <typename Bits>
void multiply(const Product& p, int32_t threads) {
  constexpr int kFew = 2;  // whose sums leave registers to more rows
  if (p.tokens <= kFew && Bits::kMostTokens > kFew) multiply_tiles<Bits, QAT_FEW_ROWS, kFew>(p, threads);
  else multiply_tiles<Bits, Bits::kMostRows, Bits::kMostTokens>(p, threads);
}

}  // namespace

// `scratch` holds the arranged input, `columns` rounded up to a multiple of 128 for each token, and 18 numbers for each
// 128 columns.
extern "C" void linear_float4(const float* x, int64_t tokens, int64_t columns, const uint8_t* weight, int64_t rows,
                              const float* table, int64_t flip, const float* scale, const float* zero, int64_t groups,
                              int64_t size, const float* bias, float* scratch, float* out, int32_t threads) {
  const int64_t padded = (columns + kBlock - 1) / kBlock * kBlock;
  // All threads or one: the OpenMP library ends those that a smaller team leaves over, and starts them again.
#pragma omp parallel for num_threads(tokens > 1 ? threads : 1) schedule(static)
  for (int64_t token = 0; token < tokens; ++token)
    arrange(x + token * columns, columns, padded, flip, scratch + token * padded);
  auto* lanes = reinterpret_cast<Lanes*>(scratch + tokens * padded);
  const Product p{scratch, tokens, columns, padded, rows, weight, table, scale, zero, groups, size, lanes, bias, out};
  if (groups == 1 || size % kBlock == 0) {
    zero ? multiply<Wide4<true>>(p, threads) : multiply<Wide4<false>>(p, threads);
  } else {
    find_lanes(columns, size, lanes);
    zero ? multiply<Narrow4<true>>(p, threads) : multiply<Narrow4<false>>(p, threads);
  }
}

// Tokens are `padded` numbers apart, a multiple of 16 and those beyond `columns` zero.
extern "C" void linear_float8(const float* x, int64_t tokens, int64_t columns, int64_t padded, const int8_t* weight,
                              int64_t rows, const float* scale, int64_t groups, int64_t size, const float* bias,
                              float* out, int32_t threads) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(weight);
  const Product p{x, tokens, columns, padded, rows, bytes, nullptr, scale, nullptr, groups, size, nullptr, bias, out};
  multiply<Whole8>(p, threads);
}

// Whether vectors of this processor are used: without them other ways are as fast.
extern "C" void linear_float_vectors(int32_t* found) {
#ifdef QAT_VECTORS
  *found = 1;
#else
  *found = 0;
#endif
}
