// The gather in front of a branch, its gradient, and what backward keeps of the branch, on a GPU.
#include "choose.cuh"
#include "grid.cuh"
#include "launch.h"

namespace layerprune {
namespace cuda {
namespace {

// Bytes in words as large as the rows allow; `size` is in words.
template <typename Word>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherParams p) {
  for_segments(p.rows, p.size, [&](int64_t row, int64_t offset, int64_t count) {
    if (row < 0) return;
    const int64_t from = existing(p.row[row], p.source.rows);
    Word* out = at<Word>(p.out, row, offset);
    const Word* in = from < 0 ? nullptr : at<Word>(p.source, from, offset);
    for_chunks<1>(count, [&](int i) { out[i] = in == nullptr ? Word{} : in[i]; });
  });
}

template <typename T, bool aligned>
__global__ void __launch_bounds__(kThreads) scatter_add_kernel(ScatterAddParams p) {
  constexpr int chunk = kChunk<T>;
  for_segments(p.rows, p.size, [&](int64_t row, int64_t offset, int64_t count) {
    if (row < 0) return;
    const int64_t to = existing(p.row[row], p.out.rows);
    if (to < 0) return;
    T* out = at<T>(p.out, to, offset);
    const T* source = at<T>(p.source, row, offset);
    for_chunks<chunk>(count, [&](int i) {
      Chunk<T, chunk> sums = load<aligned, chunk>(out + i, count - i);
      const Chunk<T, chunk> added = load<aligned, chunk>(source + i, count - i);
#pragma unroll
      for (int e = 0; e < chunk; ++e) narrow(widen(sums.v[e]) + widen(added.v[e]), &sums.v[e]);
      store<aligned>(out + i, sums, count - i);
    });
  });
}

template <typename T, bool aligned>
__global__ void __launch_bounds__(kThreads) difference_kernel(DifferenceParams p) {
  using A = Accumulated<T>;
  constexpr int chunk = kChunk<T>;
  for_segments(p.rows, p.size, [&](int64_t row, int64_t offset, int64_t count) {
    if (row < 0) return;
    const int64_t x_row = existing(p.x_row[row], p.x.rows);
    const int64_t branch_row = existing(p.branch_row[row], p.branch.rows);
    const bool absent = x_row < 0 || branch_row < 0;
    const T* x = absent ? nullptr : at<T>(p.x, x_row, offset);
    const T* branch = absent ? nullptr : at<T>(p.branch, branch_row, offset);
    A* out = at<A>(p.out, row, offset);
    for_chunks<chunk>(count, [&](int i) {
      Chunk<A, chunk> result = {};
      if (!absent) {
        const Chunk<T, chunk> a = load<aligned, chunk>(branch + i, count - i);
        const Chunk<T, chunk> b = load<aligned, chunk>(x + i, count - i);
#pragma unroll
        for (int e = 0; e < chunk; ++e) result.v[e] = widen(a.v[e]) - widen(b.v[e]);
      }
      store<aligned>(out + i, result, count - i);
    });
  });
}

// Tries words of `Word` and then of the smaller ones.
template <typename Word, typename... Smaller>
cudaError_t gather_by(const GatherParams& p, cudaStream_t stream) {
  constexpr int64_t width = sizeof(Word);
  const int64_t in = p.source.stride * p.element_bytes, out = p.out.stride * p.element_bytes;
  const int64_t row_bytes = p.size * p.element_bytes;
  const auto addresses =
      reinterpret_cast<uintptr_t>(p.source.data) | reinterpret_cast<uintptr_t>(p.out.data);
  if constexpr (sizeof...(Smaller) > 0) {
    if (addresses % width != 0 || (in | out | row_bytes) % width != 0) {
      return gather_by<Smaller...>(p, stream);
    }
  }
  GatherParams q = p;
  q.size = row_bytes / width;
  q.source.stride = in / width;
  q.out.stride = out / width;
  const Layout layout = row_layout(q.rows, q.size, 1);
  gather_kernel<Word><<<layout.grid, layout.block, 0, stream>>>(q);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch(const GatherParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.size == 0) return cudaSuccess;
  return gather_by<uint4, uint32_t, uint16_t, uint8_t>(p, stream);
}

cudaError_t launch(const ScatterAddParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.size == 0) return cudaSuccess;
  return by_type(p.type, [&](auto element) {
    using T = decltype(element);
    const bool all_aligned = rows_aligned<T>(p.source, p.size) && rows_aligned<T>(p.out, p.size);
    return by_alignment(all_aligned, [&](auto aligned) {
      const Layout layout = row_layout(p.rows, p.size, kChunk<T>);
      scatter_add_kernel<T, aligned()><<<layout.grid, layout.block, 0, stream>>>(p);
      return cudaGetLastError();
    });
  });
}

cudaError_t launch(const DifferenceParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.size == 0) return cudaSuccess;
  return by_type(p.type, [&](auto element) {
    using T = decltype(element);
    const bool all_aligned = rows_aligned<T>(p.branch, p.size) && rows_aligned<T>(p.x, p.size) &&
                             rows_aligned<Accumulated<T>>(p.out, p.size);
    return by_alignment(all_aligned, [&](auto aligned) {
      const Layout layout = row_layout(p.rows, p.size, kChunk<T>);
      difference_kernel<T, aligned()><<<layout.grid, layout.block, 0, stream>>>(p);
      return cudaGetLastError();
    });
  });
}

}  // namespace cuda
}  // namespace layerprune
