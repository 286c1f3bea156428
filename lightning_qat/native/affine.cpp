// Integers of up to 8 bits with one scale for each run of elements, and back: as ops/affine.py defines them.
#include "widen.h"

using namespace qat;

namespace {

// Elements that go through all steps at a time: an even number.
constexpr int64_t kPiece = 1024;

struct Runs {
  const float *scale, *zero;  // of every run; zero holds whole numbers, or is null
  int64_t length;
};

// Calls body(at, count, place, run) for the parts of runs in the piece that begins at `begin`.
template <typename Body>
inline void walk_piece(int64_t begin, int64_t count, int64_t length, const Body& body) {
  for (int64_t done = 0; done < count;) {
    const int64_t run = (begin + done) / length, left = (run + 1) * length - begin - done;
    const int64_t n = left < count - done ? left : count - done;
    body(begin + done, n, done, run);
    done += n;
  }
}

// Clamping before rounding is the same between whole numbers.
inline void write_codes(float* ratios, int64_t count, float first, float last, int32_t zero, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = clamp(ratios[i], first, last);
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(round_even(x == x ? x : 0.0f)) + zero);
  }
}

// Two codes a byte, the first in the low half. Memory is little-endian wherever this is compiled.
inline void pack(const uint8_t* codes, int64_t count, uint8_t* packed) {
  for (int64_t i = 0; i < (count + 1) / 2; ++i) {
    uint16_t pair;
    std::memcpy(&pair, codes + 2 * i, 2);
    packed[i] = static_cast<uint8_t>(pair | (pair >> 4));
  }
}

// `offset` is added to the codes; with `packs` they become nibbles.
template <typename T>
void quantize(const T* x, const Runs& runs, uint8_t* to, int64_t count, float first, float last, int32_t offset,
              int32_t packs, int32_t threads) {
  const int64_t pieces = (count + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    alignas(64) float ratios[kPiece];
    alignas(64) uint8_t codes[kPiece];
    const int64_t begin = piece * kPiece, n = count - begin < kPiece ? count - begin : kPiece;
    uint8_t* target = packs ? codes : to + begin;
    widen(x + begin, n, ratios);
    walk_piece(begin, n, runs.length, [&](int64_t, int64_t m, int64_t place, int64_t run) {
      const float scale = runs.scale[run], zero = runs.zero ? runs.zero[run] : 0.0f;
      for (int64_t i = 0; i < m; ++i) ratios[place + i] /= scale;
      write_codes(ratios + place, m, first - zero, last - zero, static_cast<int32_t>(zero) + offset, target + place);
    });
    if (!packs) continue;
    if (n % 2) codes[n] = 0;
    pack(codes, n, to + begin / 2);
  }
}

// (code - zero) * scale * factor, rounded after each step.
template <typename Code, typename T>
void dequantize(const Code* codes, const Runs& runs, float factor, T* to, int64_t count, int32_t threads) {
  const int64_t pieces = (count + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    alignas(64) float values[kPiece];
    const int64_t begin = piece * kPiece, n = count - begin < kPiece ? count - begin : kPiece;
    walk_piece(begin, n, runs.length, [&](int64_t at, int64_t m, int64_t place, int64_t run) {
      const float scale = runs.scale[run], zero = runs.zero ? runs.zero[run] : 0.0f;
      float* to = values + place;
      for (int64_t i = 0; i < m; ++i) to[i] = (static_cast<float>(codes[at + i]) - zero) * scale * factor;
    });
    narrow(values, n, to + begin);
  }
}

}  // namespace

#define FAMILY(NAME, T)                                                                                             \
  extern "C" void quantize_##NAME(const T* x, const float* scale, const float* zero, int64_t run, uint8_t* to,      \
                                  int64_t count, float first, float last, int32_t offset, int32_t packs,            \
                                  int32_t threads) {                                                                \
    quantize<T>(x, Runs{scale, zero, run}, to, count, first, last, offset, packs, threads);                         \
  }                                                                                                                 \
  extern "C" void dequantize_##NAME(const void* codes, int32_t is_signed, const float* scale, const float* zero,    \
                                    int64_t run, float factor, T* to, int64_t count, int32_t threads) {             \
    const Runs runs{scale, zero, run};                                                                              \
    if (is_signed) dequantize(static_cast<const int8_t*>(codes), runs, factor, to, count, threads);                 \
    else dequantize(static_cast<const uint8_t*>(codes), runs, factor, to, count, threads);                          \
  }

FAMILY(float32, float)
FAMILY(bfloat16, BFloat16)
#if defined(HALVES)
FAMILY(float16, _Float16)
#endif
