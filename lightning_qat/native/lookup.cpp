// Stored codes straight to values: (table[code] - zero) * scale, as ops/lookup_cpu.py has it.
#include "widen.h"

using namespace qat;

namespace {

// Elements whose values are looked up before they are multiplied: an even number.
constexpr int64_t kPiece = 512;

struct Runs {
  const float *scale, *zero;  // of every run; zero may be null
  int64_t length;
};

inline void scale_by(float* values, int64_t count, const Runs& runs, int64_t run) {
  const float scale = runs.scale[run];
  if (runs.zero) {
    const float zero = runs.zero[run];
    for (int64_t i = 0; i < count; ++i) values[i] = (values[i] - zero) * scale;
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] *= scale;
  }
}

// `Entry` is what a byte stands for: a float, or two of them as one word that is only copied.
template <typename Entry>
void look_up(const Entry* table, const uint8_t* stored, int64_t count, float* values) {
  auto* to = reinterpret_cast<char*>(values);
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * sizeof(Entry), table + stored[i], sizeof(Entry));
}

template <typename Entry, typename T>
void write(const Entry* table, const uint8_t* stored, const Runs& runs, T* to, int64_t count, int32_t threads) {
  constexpr int64_t kEach = sizeof(Entry) / sizeof(float);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    // Parts begin with whole pieces, whatever the runs are.
    const int64_t pieces = (count + kPiece - 1) / kPiece;
    const int64_t begin = share(pieces, part, threads) * kPiece, end = share(pieces, part + 1, threads) * kPiece;
    alignas(64) float values[kPiece];
    int64_t run = begin / runs.length, left = (run + 1) * runs.length - begin;
    for (int64_t at = begin; at < end && at < count; at += kPiece) {
      const int64_t n = count - at < kPiece ? count - at : kPiece;
      look_up(table, stored + at / kEach, (n + kEach - 1) / kEach, values);
      for (int64_t from = 0; from < n;) {
        const int64_t length = left < n - from ? left : n - from;
        scale_by(values + from, length, runs, run);
        from += length;
        left -= length;
        if (!left) {
          ++run;
          left = runs.length;
        }
      }
      narrow(values, n, to + at);
    }
  }
}

}  // namespace

#define FAMILY(NAME, T)                                                                                             \
  extern "C" void values_##NAME(const float* table, const uint8_t* stored, const float* scale, const float* zero,   \
                                int64_t run, T* to, int64_t count, int32_t threads) {                               \
    write<uint32_t, T>(reinterpret_cast<const uint32_t*>(table), stored, Runs{scale, zero, run}, to, count, threads); \
  }                                                                                                                 \
  extern "C" void pairs_##NAME(const float* table, const uint8_t* stored, const float* scale, const float* zero,    \
                               int64_t run, T* to, int64_t count, int32_t threads) {                                \
    write<uint64_t, T>(reinterpret_cast<const uint64_t*>(table), stored, Runs{scale, zero, run}, to, count, threads); \
  }

FAMILY(float32, float)
FAMILY(bfloat16, BFloat16)
#if defined(HALVES)
FAMILY(float16, _Float16)
#endif
