// Operation 2 on a GPU, forward.
#include "choose.cuh"
#include "grid.cuh"
#include "launch.h"

namespace layerprune {
namespace cuda {
namespace {

// One element of a row whose gate is not 0.
template <SumForm form, typename T>
__device__ inline T combined(T x, T branch, Accumulated<T> gate) {
  using A = Accumulated<T>;
  const A a = widen(x), b = widen(branch);
  T y;
  if constexpr (form == SumForm::kLerp) {
    // From the nearer end, as torch.lerp: exact at both.
    if (gate == 1) return branch;
    narrow(gate < A{0.5} && gate > A{-0.5} ? fma(gate, b - a, a) : b - (b - a) * (A{1} - gate), &y);
  } else {
    narrow(fma(gate, b, a), &y);
  }
  return form == SumForm::kAddRelu ? relu(y) : y;
}

template <typename T, SumForm form, bool aligned>
__global__ void __launch_bounds__(kThreads) forward_kernel(ForwardParams p) {
  constexpr int chunk = kSumChunk<T, form>;
  for_segments(p.rows, p.size, [&](int64_t row, int64_t offset, int64_t count) {
    if (row < 0) return;
    const int64_t slot = existing(p.slot == nullptr ? row : p.slot[row], p.branch.rows);
    const Accumulated<T> gate = gate_of(p, row);
    if (p.sampled.gates != nullptr && offset == 0 && threadIdx.x == 0) p.sampled.gates[row] = gate;
    const T* x = at<T>(p.x, row, offset);
    T* y = at<T>(p.y, row, offset);
    const auto put = [&](int i, const Chunk<T, chunk>& values) {
      store<aligned>(y + i, values, count - i);
      if constexpr (form == SumForm::kAddRelu) {
        if (p.mask == nullptr) return;
        p.mask[row * mask_bytes(p.size) + (offset + i) / kMaskBits] = passing(values);
      }
    };
    if (slot < 0 || gate == 0) {
      for_chunks<chunk>(count, [&](int i) {
        Chunk<T, chunk> values = load<aligned, chunk>(x + i, count - i);
        if constexpr (form == SumForm::kAddRelu) {
#pragma unroll
          for (int e = 0; e < chunk; ++e) values.v[e] = relu(values.v[e]);
        }
        put(i, values);
      });
      return;
    }
    const T* branch = at<T>(p.branch, slot, offset);
    for_chunks<chunk>(count, [&](int i) {
      Chunk<T, chunk> values = load<aligned, chunk>(x + i, count - i);
      const Chunk<T, chunk> others = load<aligned, chunk>(branch + i, count - i);
#pragma unroll
      for (int e = 0; e < chunk; ++e) {
        values.v[e] = combined<form>(values.v[e], others.v[e], gate);
      }
      put(i, values);
    });
  });
}

}  // namespace

cudaError_t launch(const ForwardParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return by_type(p.type, [&](auto element) {
    using T = decltype(element);
    return by_form(p.form, [&](auto form) {
      const bool all_aligned = p.size % kSumChunk<T, form()> == 0 && rows_aligned<T>(p.x, p.size) &&
                               rows_aligned<T>(p.branch, p.size) && rows_aligned<T>(p.y, p.size);
      return by_alignment(all_aligned, [&](auto aligned) {
        const Layout layout = row_layout(p.rows, p.size, kSumChunk<T, form()>);
        forward_kernel<T, form(), aligned()><<<layout.grid, layout.block, 0, stream>>>(p);
        return cudaGetLastError();
      });
    });
  });
}

}  // namespace cuda
}  // namespace layerprune
