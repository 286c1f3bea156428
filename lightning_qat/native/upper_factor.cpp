// The upper triangle of a Gram matrix in another order, in float64: one pass where PyTorch takes four, two of them over
// columns that do not lie together.
#include <cstdint>

extern "C" void gather_upper(const float* matrix, const int64_t* order, float unit, int64_t size, double* out,
                             int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 8)
  for (int64_t i = 0; i < size; ++i) {
    const float* row = matrix + order[i] * size;
    for (int64_t j = i; j < size; ++j) out[i * size + j] = static_cast<double>(row[order[j]] / unit);
  }
}
