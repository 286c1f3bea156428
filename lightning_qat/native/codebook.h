// What the kernels of the codebook formats share: the rule that chooses codes, and the search for them.
#pragma once

#include "widen.h"

namespace qat {

// Elements that go through all steps at a time, in memory of the stack: even, so that two codes make a byte.
constexpr int64_t kPiece = 1024;

// As ops/codebook_tables.py has it. `steps` is the 8-bit CPU rule's table of 65,536, or null.
struct Rule {
  const float* thresholds;
  const uint8_t* codes;
  const float* values;
  const uint8_t* steps;
  int32_t bits, nan_code, fill_code;
  float least;
  int32_t divides;
};

// --- magnitudes -----------------------------------------------------------------------------------

template <typename T>
struct Word {
  using Type = uint16_t;
};
template <>
struct Word<float> {
  using Type = uint32_t;
};

// The order of magnitudes is that of their bits as integers, in which a NaN is larger than infinity: it comes through.
template <typename T>
inline float absmax_of(const T* x, int64_t count) {
  using U = typename Word<T>::Type;
  constexpr U kMagnitude = static_cast<U>(~U{0}) >> 1;
  U most = 0;
  for (int64_t i = 0; i < count; ++i) {
    U bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= kMagnitude;
    most = bits > most ? bits : most;
  }
  T value;
  std::memcpy(&value, &most, sizeof value);
  return load(value);
}

inline float at_least(float x, float least) { return x < least ? least : x; }

// --- ratios ---------------------------------------------------------------------------------------

template <typename T>
inline void write_ratios(const T* x, int64_t count, float divisor, bool divides, float* ratios) {
  widen(x, count, ratios);
  if (divides) {
    for (int64_t i = 0; i < count; ++i) ratios[i] /= divisor;
  } else {
    const float factor = 1.0f / divisor;
    for (int64_t i = 0; i < count; ++i) ratios[i] *= factor;
  }
}

// --- codes ----------------------------------------------------------------------------------------

#if defined(WIDE)

// How many of 15 thresholds are below each of 16 ratios, by halves: each step's candidates are in one register.
class Search {
 public:
  explicit Search(const Rule& rule) : nan_(_mm512_set1_epi32(rule.nan_code)) {
    float padded[32];
    for (int i = 0; i < 32; ++i) padded[i] = rule.thresholds[i < 15 ? i : 14];
    middle_ = _mm512_set1_ps(padded[7]);
    for (int level = 0; level < 3; ++level) candidates_[level] = _mm512_loadu_ps(padded + (4 >> level) - 1);
    codes_ = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rule.codes)));
  }

  // `count` is rounded up to 16, on both sides.
  void operator()(const float* ratios, int64_t count, uint8_t* codes) const {
    for (int64_t i = 0; i < count; i += 16) {
      const __m512 x = _mm512_loadu_ps(ratios + i);
      __m512i bin = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, middle_, _CMP_GT_OQ), 8);
      for (int level = 0; level < 3; ++level) {
        const __m512 limit = _mm512_permutexvar_ps(bin, candidates_[level]);
        const __mmask16 above = _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ);
        bin = _mm512_mask_add_epi32(bin, above, bin, _mm512_set1_epi32(4 >> level));
      }
      bin = _mm512_permutexvar_epi32(bin, codes_);
      bin = _mm512_mask_mov_epi32(bin, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan_);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(bin));
    }
  }

 private:
  __m512 middle_, candidates_[3];
  __m512i codes_, nan_;
};

#else

// The same by counting, sixteen ratios at a time.
class Search {
 public:
  explicit Search(const Rule& rule) : rule_(rule) {}

  void operator()(const float* ratios, int64_t count, uint8_t* codes) const {
    for (int64_t i = 0; i < count; i += 16) {
      int32_t bins[16] = {};
      for (int t = 0; t < 15; ++t) {
        const float limit = rule_.thresholds[t];
        for (int j = 0; j < 16; ++j) bins[j] += ratios[i + j] > limit;
      }
      for (int j = 0; j < 16; ++j) {
        const uint8_t code = rule_.codes[bins[j]];
        codes[i + j] = ratios[i + j] != ratios[i + j] ? static_cast<uint8_t>(rule_.nan_code) : code;
      }
    }
  }

 private:
  const Rule rule_;
};

#endif

// Table of equal steps: a NaN goes to the first.
inline void look_up_steps(const float* ratios, int64_t count, const uint8_t* steps, uint8_t* codes) {
  int32_t index[kPiece];
  for (int64_t i = 0; i < count; ++i) {
    const float x = ratios[i] == ratios[i] ? clamp(ratios[i], -1.0f, 1.0f) : -1.0f;
    index[i] = static_cast<int32_t>((x + 1.0f) * 32767.5f + 0.5f);
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = steps[index[i]];
}

// 255 thresholds by halves.
inline void search_256(const float* ratios, int64_t count, const Rule& rule, uint8_t* codes) {
  int32_t bins[kPiece];
  for (int64_t i = 0; i < count; ++i) {
    int32_t bin = 0;
    // Products, not choices: what is above is as good as random, and a wrong guess costs more than all eight steps.
    for (int32_t step = 128; step; step >>= 1) bin += step * (ratios[i] > rule.thresholds[bin + step - 1]);
    bins[i] = bin;
  }
  for (int64_t i = 0; i < count; ++i) {
    codes[i] = ratios[i] != ratios[i] ? static_cast<uint8_t>(rule.nan_code) : rule.codes[bins[i]];
  }
}

// Codes of up to kPiece ratios. With 4 bits as many as fill 16 are read, and their codes written.
class Chooser {
 public:
  explicit Chooser(const Rule& rule) : rule_(rule), search_(rule) {}

  void operator()(const float* ratios, int64_t count, uint8_t* codes) const {
    if (rule_.bits == 4) search_(ratios, count, codes);
    else if (rule_.steps) look_up_steps(ratios, count, rule_.steps, codes);
    else search_256(ratios, count, rule_, codes);
  }

 private:
  const Rule rule_;
  const Search search_;
};

// --- walks ----------------------------------------------------------------------------------------

// Part `part` of a tensor in whole blocks, two by two where a block is odd: no byte then has codes of two parts.
struct Range {
  int64_t begin, end;
};

inline Range part_of(int64_t count, int64_t block, int32_t part, int32_t parts) {
  const int64_t unit = block % 2 ? 2 * block : block, units = (count + unit - 1) / unit;
  const int64_t begin = share(units, part, parts) * unit, end = share(units, part + 1, parts) * unit;
  return {begin, end < count ? end : count};
}

// Calls start(block) at each block, fill(from, count, at) for what goes to place `at` of the piece's memory, and
// flush(from, count) for every full piece and the last.
template <typename Start, typename Fill, typename Flush>
inline void walk_blocks(Range range, int64_t block, const Start& start, const Fill& fill, const Flush& flush) {
  int64_t filled = 0, index = range.begin / block;
  for (int64_t from = range.begin; from < range.end; ++index) {
    const int64_t stop = (index + 1) * block < range.end ? (index + 1) * block : range.end;
    start(index, from, stop);
    while (from < stop) {
      const int64_t room = kPiece - filled, count = stop - from < room ? stop - from : room;
      fill(from, count, filled);
      from += count;
      filled += count;
      if (filled == kPiece) {
        flush(from - filled, filled);
        filled = 0;
      }
    }
  }
  if (filled) flush(range.end - filled, filled);
}

}  // namespace qat
