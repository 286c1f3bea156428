// Codebook formats: from floats to stored codes, and through them to floats again, in one pass over memory each.
// Definitions are in ops/codebook.py; codes, scales and values are theirs to the last bit.
#include "codebook.h"

using namespace qat;

namespace {

// Two codes a byte, the first in the high half. Memory is little-endian wherever this is compiled.
void pack(const uint8_t* codes, int64_t count, uint8_t* packed) {
  for (int64_t i = 0; i < (count + 1) / 2; ++i) {
    uint16_t pair;
    std::memcpy(&pair, codes + 2 * i, 2);
    packed[i] = static_cast<uint8_t>((pair << 4) | (pair >> 8));
  }
}

// Blocks have the scale of `given`, or their own where that is null; either way it is written to `scale`.
template <typename T>
void quantize(const T* x, const float* given, float* scale, uint8_t* stored, int64_t count, int64_t block,
              const Rule& rule, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    alignas(64) float ratios[kPiece] = {};
    alignas(64) uint8_t codes[kPiece];
    const Chooser choose(rule);
    float divisor = 1.0f;
    bool divides = false;
    walk_blocks(
        part_of(count, block, part, threads), block,
        [&](int64_t index, int64_t from, int64_t stop) {
          divides = rule.divides && stop - from < block;
          float absmax = given ? given[index] : absmax_of(x + from, stop - from);
          if (!given && divides) absmax = at_least(absmax, rule.least);
          scale[index] = absmax;
          divisor = at_least(absmax, rule.least);
        },
        [&](int64_t from, int64_t n, int64_t at) { write_ratios(x + from, n, divisor, divides, ratios + at); },
        [&](int64_t from, int64_t n) {
          if (rule.bits == 8) return choose(ratios, n, stored + from);
          choose(ratios, n, codes);
          if (n % 2) codes[n] = static_cast<uint8_t>(rule.fill_code);
          pack(codes, n, stored + from / 2);
        });
  }
}

// A NaN of `x` is one of `values`. `scratch` gets what it likes.
template <typename T>
void keep_nan(const T* x, int64_t count, float* values, float* scratch) {
  widen(x, count, scratch);
  for (int64_t i = 0; i < count; ++i) values[i] = scratch[i] != scratch[i] ? scratch[i] : values[i];
}

template <typename T>
void fake_quantize(const T* x, const float* scale, const float* stored, T* to, int64_t count, int64_t block,
                   const Rule& rule, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    alignas(64) float ratios[kPiece] = {};
    alignas(64) float scales[kPiece];
    alignas(64) uint8_t codes[kPiece];
    const Chooser choose(rule);
    float divisor = 1.0f, factor = 1.0f;
    bool divides = false;
    walk_blocks(
        part_of(count, block, part, threads), block,
        [&](int64_t index, int64_t from, int64_t stop) {
          divides = rule.divides && stop - from < block;
          divisor = at_least(scale[index], rule.least);
          factor = stored[index];
        },
        [&](int64_t from, int64_t n, int64_t at) {
          write_ratios(x + from, n, divisor, divides, ratios + at);
          for (int64_t i = 0; i < n; ++i) scales[at + i] = factor;
        },
        [&](int64_t from, int64_t n) {
          choose(ratios, n, codes);
          for (int64_t i = 0; i < n; ++i) scales[i] *= rule.values[codes[i]];
          keep_nan(x + from, n, scales, ratios);
          narrow(scales, n, to + from);
        });
  }
}

// The gradient passes where the margin is 0 or more; of a NaN it is neither.
template <typename T, typename U = typename Word<T>::Type>
void gradient(const U* grad, const T* x, const float* limits, U* to, int64_t count, int64_t block, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    float margins[kPiece], limit = 0.0f;
    walk_blocks(
        part_of(count, block, part, threads), block, [&](int64_t index, int64_t, int64_t) { limit = limits[index]; },
        [&](int64_t from, int64_t n, int64_t at) {
          widen(x + from, n, margins + at);
          for (int64_t i = 0; i < n; ++i) margins[at + i] = limit - std::fabs(margins[at + i]);
        },
        [&](int64_t from, int64_t n) {
          for (int64_t i = 0; i < n; ++i) {
            const U passed = grad[from + i];
            to[from + i] = margins[i] >= 0.0f ? passed : U{0};
          }
        });
  }
}

template <typename T>
void absmax(const T* x, float* to, int64_t count, int64_t block, float least, int32_t threads) {
  const int64_t blocks = (count + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t index = 0; index < blocks; ++index) {
    const int64_t from = index * block, length = count - from < block ? count - from : block;
    const float found = absmax_of(x + from, length);
    to[index] = length < block ? at_least(found, least) : found;
  }
}

// To the value below or above, the latter where `noise` is less than the share of the way there. `ordered` are the
// values of the bins, which `rule.codes` gives their codes; a value equal to one of them is not below it.
template <typename T>
void draw(const T* x, const float* scale, const float* noise, const float* ordered, uint8_t* to, int64_t count,
          int64_t block, const Rule& rule, int32_t threads) {
  const int32_t last = rule.bits == 4 ? 14 : 254;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    float ratios[kPiece], divisor = 1.0f;
    bool divides = false;
    walk_blocks(
        part_of(count, block, part, threads), block,
        [&](int64_t index, int64_t from, int64_t stop) {
          divides = rule.divides && stop - from < block;
          divisor = at_least(scale[index], rule.least);
        },
        [&](int64_t from, int64_t n, int64_t at) { write_ratios(x + from, n, divisor, divides, ratios + at); },
        [&](int64_t from, int64_t n) {
          for (int64_t i = 0; i < n; ++i) {
            const float ratio = ratios[i];
            int32_t below = 0;  // the last of 0 to `last` that is not above; 0 where all are
            for (int32_t step = (last + 2) / 2; step; step >>= 1) {
              const int32_t next = below + step;
              below = next <= last && !(ordered[next <= last ? next : last] > ratio) ? next : below;
            }
            const float upward = (ratio - ordered[below]) / (ordered[below + 1] - ordered[below]);
            const uint8_t code = rule.codes[below + (noise[from + i] < upward)];
            to[from + i] = ratio != ratio ? static_cast<uint8_t>(rule.nan_code) : code;
          }
        });
  }
}

}  // namespace

#define RULE                                                                                                        \
  const float *thresholds, const uint8_t *codes, const float *values, const uint8_t *steps, int32_t bits,           \
      int32_t nan_code, int32_t fill_code, float least, int32_t divides
#define GIVEN Rule{thresholds, codes, values, steps, bits, nan_code, fill_code, least, divides}

#define FAMILY(NAME, T)                                                                                             \
  extern "C" void absmax_##NAME(const T* x, float* to, int64_t count, int64_t block, float least, int32_t threads) { \
    absmax<T>(x, to, count, block, least, threads);                                                                 \
  }                                                                                                                 \
  extern "C" void quantize_##NAME(const T* x, const float* given, float* scale, uint8_t* stored, int64_t count,     \
                                  int64_t block, RULE, int32_t threads) {                                           \
    quantize<T>(x, given, scale, stored, count, block, GIVEN, threads);                                             \
  }                                                                                                                 \
  extern "C" void fake_quantize_##NAME(const T* x, const float* scale, const float* stored, T* to, int64_t count,   \
                                       int64_t block, RULE, int32_t threads) {                                      \
    fake_quantize<T>(x, scale, stored, to, count, block, GIVEN, threads);                                           \
  }                                                                                                                 \
  extern "C" void gradient_##NAME(const Word<T>::Type* grad, const T* x, const float* limits, Word<T>::Type* to,    \
                                  int64_t count, int64_t block, int32_t threads) {                                  \
    gradient<T>(grad, x, limits, to, count, block, threads);                                                        \
  }                                                                                                                 \
  extern "C" void draw_##NAME(const T* x, const float* scale, const float* noise, const float* ordered, uint8_t* to, \
                              int64_t count, int64_t block, RULE, int32_t threads) {                                \
    draw<T>(x, scale, noise, ordered, to, count, block, GIVEN, threads);                                            \
  }

FAMILY(float32, float)
FAMILY(bfloat16, BFloat16)
#if defined(HALVES)
FAMILY(float16, _Float16)
#endif
