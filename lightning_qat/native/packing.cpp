// Codes of 2 to 7 bits to a stream of bytes and back, and the nibbles of bitsandbytes: see ops/packing.py, ops/nibbles.py.
#include "arithmetic.h"

using namespace qat;

namespace {

// Eight codes fill kBits bytes.
constexpr int64_t kRun = 8;

// `offset` makes codes unsigned. Memory is little-endian wherever this is compiled.
template <int kBits>
void pack_run(const uint8_t* codes, int64_t count, uint8_t offset, uint8_t* packed) {
  uint64_t word = 0;
  for (int64_t i = 0; i < count; ++i) {
    word |= static_cast<uint64_t>(static_cast<uint8_t>(codes[i] + offset)) << (i * kBits);
  }
  std::memcpy(packed, &word, (count * kBits + 7) / 8);
}

template <int kBits>
void unpack_run(const uint8_t* packed, int64_t count, uint8_t offset, uint8_t* codes) {
  uint64_t word = 0;
  std::memcpy(&word, packed, (count * kBits + 7) / 8);
  constexpr uint64_t kMask = (1u << kBits) - 1;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(((word >> (i * kBits)) & kMask) - offset);
}

template <int kBits, bool kPacks>
void stream(const uint8_t* from, uint8_t* to, int64_t count, uint8_t offset, int32_t threads) {
  const int64_t runs = count / kRun, rest = count % kRun;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t run = 0; run < runs; ++run) {
    // Known lengths, so that the compiler unrolls them.
    if (kPacks) pack_run<kBits>(from + run * kRun, kRun, offset, to + run * kBits);
    else unpack_run<kBits>(from + run * kBits, kRun, offset, to + run * kRun);
  }
  if (!rest) return;
  if (kPacks) pack_run<kBits>(from + runs * kRun, rest, offset, to + runs * kBits);
  else unpack_run<kBits>(from + runs * kBits, rest, offset, to + runs * kRun);
}

// Two codes a byte: the first in the low half, or in the high one.
template <bool kHighFirst>
void pack_halves(const uint8_t* codes, uint8_t* packed, int64_t count, uint8_t offset, uint8_t fill, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count / 2; ++i) {
    const uint8_t first = codes[2 * i] + offset, second = codes[2 * i + 1] + offset;
    packed[i] = static_cast<uint8_t>(kHighFirst ? first << 4 | second : second << 4 | first);
  }
  if (count % 2) {
    const uint8_t first = codes[count - 1] + offset;
    packed[count / 2] = static_cast<uint8_t>(kHighFirst ? first << 4 | fill : fill << 4 | first);
  }
}

template <bool kHighFirst>
void unpack_halves(const uint8_t* packed, uint8_t* codes, int64_t count, uint8_t offset, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count / 2; ++i) {
    const uint8_t high = packed[i] >> 4, low = packed[i] & 15;
    codes[2 * i] = static_cast<uint8_t>((kHighFirst ? high : low) - offset);
    codes[2 * i + 1] = static_cast<uint8_t>((kHighFirst ? low : high) - offset);
  }
  if (count % 2) {
    const uint8_t last = packed[count / 2];
    codes[count - 1] = static_cast<uint8_t>((kHighFirst ? last >> 4 : last & 15) - offset);
  }
}

template <bool kPacks>
void convert(const uint8_t* from, uint8_t* to, int64_t count, int32_t bits, uint8_t offset, int32_t threads) {
  switch (bits) {
    case 2: return stream<2, kPacks>(from, to, count, offset, threads);
    case 3: return stream<3, kPacks>(from, to, count, offset, threads);
    case 5: return stream<5, kPacks>(from, to, count, offset, threads);
    case 6: return stream<6, kPacks>(from, to, count, offset, threads);
    case 7: return stream<7, kPacks>(from, to, count, offset, threads);
  }
}

}  // namespace

extern "C" void pack_bits(const uint8_t* codes, uint8_t* packed, int64_t count, int32_t bits, int32_t offset,
                          int32_t threads) {
  const auto shift = static_cast<uint8_t>(offset);
  if (bits == 4) pack_halves<false>(codes, packed, count, shift, 0, threads);
  else convert<true>(codes, packed, count, bits, shift, threads);
}

extern "C" void unpack_bits(const uint8_t* packed, uint8_t* codes, int64_t count, int32_t bits, int32_t offset,
                            int32_t threads) {
  const auto shift = static_cast<uint8_t>(offset);
  if (bits == 4) unpack_halves<false>(packed, codes, count, shift, threads);
  else convert<false>(packed, codes, count, bits, shift, threads);
}

extern "C" void pack_nibbles(const uint8_t* codes, uint8_t* packed, int64_t count, int32_t fill, int32_t threads) {
  pack_halves<true>(codes, packed, count, 0, static_cast<uint8_t>(fill), threads);
}

extern "C" void unpack_nibbles(const uint8_t* packed, uint8_t* codes, int64_t count, int32_t threads) {
  unpack_halves<true>(packed, codes, count, 0, threads);
}
