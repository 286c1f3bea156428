// A block of columns of GPTQ, or of coordinate descent, for all rows: the bits of the definitions in ops/gptq.py and
// ops/coordinate_descent.py. Rows are independent, so 64 of them walk through the block together in the caches, one to
// a lane of four vectors.
#include "gptq.h"

using namespace qat;

namespace {

// GPTQ rounds a column as it is; others make up for its error in units of the diagonal. Coordinate descent rounds to
// where the loss is least with all others fixed.
template <bool kDescends, class Grid>
void choose(const Block& block, const Grid& grid, int64_t j, int64_t first, int64_t lanes, const float* left,
            float* taken) {
  const float diagonal = block.matrix[j * block.count + j];
  const float* step = block.step + j * block.rows + first;
  const float* now = kDescends ? block.current + j * block.rows + first : nullptr;
  float x[kLanes], value[kLanes];
  if (kDescends) {
    for (int64_t l = 0; l < lanes; ++l) x[l] = now[l] + left[l] / diagonal;
  } else {
    for (int64_t l = 0; l < lanes; ++l) x[l] = left[l];
  }
  grid.nearest(x, step, j * block.rows + first, lanes, block.codes + j * block.rows + first, value);
  float* out = block.errors + j * block.rows + first;
  if (kDescends) {
    for (int64_t l = 0; l < lanes; ++l) taken[l] = value[l] - now[l];
  } else {
    for (int64_t l = 0; l < lanes; ++l) taken[l] = (x[l] - value[l]) / diagonal;
  }
  for (int64_t l = 0; l < lanes; ++l) out[l] = taken[l];
}

// Columns are taken four at a time: the errors before them are read once for all four.
template <bool kDescends, class Grid, int kColumns>
void walk_columns(const Block& block, const Grid& grid, int64_t j, int64_t first, int64_t lanes, float* taken) {
  Vector left[kColumns][kVectors];
  for (int c = 0; c < kColumns; ++c) {
    alignas(64) float column[kLanes] = {};
    const float* source = block.columns + (j + c) * block.rows + first;
    for (int64_t l = 0; l < lanes; ++l) column[l] = source[l];
    std::memcpy(left[c], column, sizeof(column));
  }
  for (int64_t i = 0; i < j; ++i) {
    Vector error[kVectors];
    std::memcpy(error, taken + i * kLanes, sizeof(error));
    const float* shares = block.matrix + i * block.count + j;
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < kVectors; ++v) left[c][v] -= shares[c] * error[v];
  }
  for (int c = 0; c < kColumns; ++c) {
    alignas(64) float column[kLanes];
    std::memcpy(column, left[c], sizeof(column));
    float* own = taken + (j + c) * kLanes;
    choose<kDescends>(block, grid, j + c, first, lanes, column, own);
    Vector error[kVectors];
    std::memcpy(error, own, sizeof(error));
    const float* shares = block.matrix + (j + c) * block.count + j;
    for (int other = c + 1; other < kColumns; ++other)
      for (int v = 0; v < kVectors; ++v) left[other][v] -= shares[other] * error[v];
  }
}

template <bool kDescends, class Grid>
void walk_tile(const Block& block, const Grid& grid, int64_t first, float* taken) {
  const int64_t lanes = block.rows - first < kLanes ? block.rows - first : kLanes;
  if (lanes < kLanes) std::memset(taken, 0, sizeof(float) * kLanes * block.count);
  int64_t j = 0;
  for (; j + 4 <= block.count; j += 4) walk_columns<kDescends, Grid, 4>(block, grid, j, first, lanes, taken);
  for (; j < block.count; ++j) walk_columns<kDescends, Grid, 1>(block, grid, j, first, lanes, taken);
}

template <bool kDescends, class Grid>
void walk(const Block& block, const Grid& grid, float* scratch, int32_t threads) {
  const int64_t tiles = (block.rows + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    float* taken = scratch + part * block.count * kLanes;
    for (int64_t tile = share(tiles, part, threads); tile < share(tiles, part + 1, threads); ++tile)
      walk_tile<kDescends>(block, grid, tile * kLanes, taken);
  }
}

template <bool kDescends>
void walk_on(const Block& block, const float* zero, float low, float high, const float* values,
             const float* thresholds, int64_t levels, float* scratch, int32_t threads) {
  if (values != nullptr) {
    walk<kDescends>(block, Table{values, thresholds, levels - 1}, scratch, threads);
  } else if (zero != nullptr) {
    walk<kDescends>(block, Integers<true>{zero, low, high}, scratch, threads);
  } else {
    walk<kDescends>(block, Integers<false>{zero, low, high}, scratch, threads);
  }
}

}  // namespace

extern "C" void gptq_block(const float* columns, const float* factor, const float* step, const float* zero, float low,
                           float high, const float* values, const float* thresholds, int64_t levels, int64_t count,
                           int64_t rows, int16_t* codes, float* errors, float* scratch, int32_t threads) {
  const Block block{columns, nullptr, factor, step, count, rows, codes, errors};
  walk_on<false>(block, zero, low, high, values, thresholds, levels, scratch, threads);
}

extern "C" void descend_block(const float* products, const float* current, const float* hessian, const float* step,
                              const float* zero, float low, float high, const float* values, const float* thresholds,
                              int64_t levels, int64_t count, int64_t rows, int16_t* codes, float* changes,
                              float* scratch, int32_t threads) {
  const Block block{products, current, hessian, step, count, rows, codes, changes};
  walk_on<true>(block, zero, low, high, values, thresholds, levels, scratch, threads);
}

// A weight transposed, its columns in an order: 64 rows at a time, which stay in the cache of a core.
extern "C" void gather_columns(const float* weight, const int64_t* order, int64_t rows, int64_t columns, float* out,
                               int32_t threads) {
  const int64_t tiles = (rows + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kLanes, lanes = rows - first < kLanes ? rows - first : kLanes;
    for (int64_t i = 0; i < columns; ++i) {
      const float* from = weight + first * columns + order[i];
      float* to = out + i * rows + first;
      for (int64_t l = 0; l < lanes; ++l) to[l] = from[l * columns];
    }
  }
}

// And back: codes of columns in that order, as the columns of a weight lie, what they are in a table of codes.
extern "C" void place_codes(const int16_t* codes, const int64_t* order, const uint8_t* table, int64_t rows,
                            int64_t columns, uint8_t* out, int32_t threads) {
  const int64_t tiles = (rows + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kLanes, lanes = rows - first < kLanes ? rows - first : kLanes;
    for (int64_t i = 0; i < columns; ++i) {
      const int16_t* from = codes + i * rows + first;
      uint8_t* to = out + first * columns + order[i];
      for (int64_t l = 0; l < lanes; ++l)
        to[l * columns] = table != nullptr ? table[from[l]] : static_cast<uint8_t>(from[l]);
    }
  }
}
