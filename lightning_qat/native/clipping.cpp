// The range of least loss for one group of columns of every row: all shares that are tried, in one pass. 64 rows go
// through the group together, one to a lane of four vectors.
#include "gptq.h"

using namespace qat;

namespace {

struct Group {
  const float* weight;  // [rows, width]
  const float* own;     // [width, width]: the Gram matrix of the group, symmetric
  const float* others;  // [rows, width]: what the errors of all other groups add to a column's product, or null
  const float* step;    // [shares, rows]
  const float* zero;    // [shares, rows], or null
  float low, high;
  int64_t shares, rows, width;
};

// Errors `Q - W` of a group with one share: column by column, a row to a lane.
void errors_of(const Group& group, const float* weight, int64_t share, int64_t first, int64_t lanes, float* errors) {
  alignas(64) float step[kLanes], zero[kLanes] = {};
  for (int64_t l = 0; l < kLanes; ++l) step[l] = 1.0f;
  for (int64_t l = 0; l < lanes; ++l) step[l] = group.step[share * group.rows + first + l];
  if (group.zero != nullptr)
    for (int64_t l = 0; l < lanes; ++l) zero[l] = group.zero[share * group.rows + first + l];
  for (int64_t j = 0; j < group.width; ++j) {
    const float* w = weight + j * kLanes;
    float* e = errors + j * kLanes;
    for (int64_t l = 0; l < kLanes; ++l) {
      const float code = clamp(round_even(w[l] / step[l]) + zero[l], group.low, group.high) - zero[l];
      e[l] = code * step[l] - w[l];
    }
  }
}

// e G e^T + 2 e o^T of every lane. Columns are taken four at a time: those before are read once for all four.
template <int kColumns>
void add_losses(const Group& group, const float* errors, const float* others, int64_t j, Vector* loss) {
  Vector product[kColumns][kVectors] = {};
  for (int64_t k = 0; k < j; ++k) {
    Vector error[kVectors];
    std::memcpy(error, errors + k * kLanes, sizeof(error));
    const float* shares = group.own + k * group.width + j;
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < kVectors; ++v) product[c][v] += shares[c] * error[v];
  }
  for (int c = 0; c < kColumns; ++c) {
    Vector error[kVectors];
    std::memcpy(error, errors + (j + c) * kLanes, sizeof(error));
    for (int other = 0; other < c; ++other) {
      Vector before[kVectors];
      std::memcpy(before, errors + (j + other) * kLanes, sizeof(before));
      for (int v = 0; v < kVectors; ++v) product[c][v] += group.own[(j + other) * group.width + j + c] * before[v];
    }
    if (others != nullptr) {
      Vector rest[kVectors];
      std::memcpy(rest, others + (j + c) * kLanes, sizeof(rest));
      for (int v = 0; v < kVectors; ++v) product[c][v] += rest[v];
    }
    const float own = group.own[(j + c) * group.width + j + c];
    for (int v = 0; v < kVectors; ++v) loss[v] += (own * error[v] + (product[c][v] + product[c][v])) * error[v];
  }
}

void losses_of(const Group& group, const float* errors, const float* others, float* losses) {
  Vector loss[kVectors] = {};
  int64_t j = 0;
  for (; j + 4 <= group.width; j += 4) add_losses<4>(group, errors, others, j, loss);
  for (; j < group.width; ++j) add_losses<1>(group, errors, others, j, loss);
  std::memcpy(losses, loss, sizeof(loss));
}

void turn(const float* rows, int64_t first, int64_t lanes, int64_t width, float* columns) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t l = 0; l < lanes; ++l) columns[j * kLanes + l] = rows[(first + l) * width + j];
    for (int64_t l = lanes; l < kLanes; ++l) columns[j * kLanes + l] = 0.0f;
  }
}

void choose(const Group& group, int64_t first, float* best, int64_t* choice, float* scratch) {
  const int64_t lanes = group.rows - first < kLanes ? group.rows - first : kLanes;
  float *weight = scratch, *errors = weight + group.width * kLanes, *others = nullptr;
  turn(group.weight, first, lanes, group.width, weight);
  if (group.others != nullptr) {
    others = errors + group.width * kLanes;
    turn(group.others, first, lanes, group.width, others);
  }
  for (int64_t share = 0; share < group.shares; ++share) {
    alignas(64) float losses[kLanes];
    errors_of(group, weight, share, first, lanes, errors);
    losses_of(group, errors, others, losses);
    for (int64_t l = 0; l < lanes; ++l) {
      if (!(losses[l] < best[first + l])) continue;
      best[first + l] = losses[l];
      choice[first + l] = share;
    }
  }
}

}  // namespace

extern "C" void best_shares(const float* weight, const float* own, const float* others, const float* step,
                            const float* zero, float low, float high, int64_t shares, int64_t rows, int64_t width,
                            float* best, int64_t* choice, float* scratch, int32_t threads) {
  const Group group{weight, own, others, step, zero, low, high, shares, rows, width};
  const int64_t tiles = (rows + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int32_t part = 0; part < threads; ++part) {
    float* own_scratch = scratch + part * 3 * width * kLanes;
    for (int64_t tile = share(tiles, part, threads); tile < share(tiles, part + 1, threads); ++tile)
      choose(group, tile * kLanes, best, choice, own_scratch);
  }
}
