// Slots and lists of rows, turned into what the kernels on rows follow, on a GPU.
#include "grid.cuh"
#include "launch.h"

namespace layerprune {
namespace cuda {
namespace {

__global__ void __launch_bounds__(kThreads) invert(InverseParams p) {
  for_each(p.count, [&](int64_t i) {
    const int64_t index = existing(p.narrow != nullptr ? int64_t{p.narrow[i]} : p.wide[i], p.size);
    if (index >= 0) p.inverse[index] = i;
  });
}

__global__ void __launch_bounds__(kThreads) choose_factor_rows(FactorRowsParams p) {
  for_each(p.count, [&](int64_t i) { choose_factor_row(p, i); });
}

}  // namespace

cudaError_t launch(const InverseParams& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  // All bits set is -1.
  const cudaError_t cleared = cudaMemsetAsync(p.inverse, 0xFF, p.size * sizeof(int64_t), stream);
  if (cleared != cudaSuccess || p.count == 0) return cleared;
  invert<<<blocks_for(p.count, kThreads), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch(const FactorRowsParams& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  choose_factor_rows<<<blocks_for(p.count, kThreads), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace layerprune
