// Operation 2 on a GPU, backward: the gradients of x and of the branch in one pass, the gates' in
// parts that a second stage sums.
#include "choose.cuh"
#include "grid.cuh"
#include "launch.h"

namespace layerprune {
namespace cuda {
namespace {

// Writes the sum over the threads of one threadIdx.y to `*to`: over each warp, then over the warps
// in order. Called by the whole block; `to` is null in threads without a segment.
template <typename A>
__device__ inline void write_sum(A partial, double* to) {
  __shared__ A warps[kThreads / kWarp];
  const int per_segment = blockDim.x / kWarp;
  const int first = threadIdx.y * per_segment;
  partial = warp_sum(partial);
  if (threadIdx.x % kWarp == 0) warps[first + threadIdx.x / kWarp] = partial;
  __syncthreads();
  if (threadIdx.x == 0 && to != nullptr) {
    A sum = warps[first];
    for (int i = 1; i < per_segment; ++i) sum += warps[first + i];
    *to = sum;
  }
  __syncthreads();  // before the next sum
}

template <typename T, SumForm form, bool aligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(BackwardParams p) {
  using A = Accumulated<T>;
  using Factor = std::conditional_t<form == SumForm::kLerp, A, T>;
  constexpr int chunk = kSumChunk<T, form>;
  const int64_t per_row = segments(p.size);
  for_segments(p.rows, p.size, [&](int64_t row, int64_t offset, int64_t count) {
    A partial = 0;
    double* part = nullptr;
    if (row >= 0) {
      const int64_t slot = existing(p.slot == nullptr ? row : p.slot[row], p.d_branch.rows);
      const A gate = gate_of(p, row);
      const bool running = slot >= 0 && gate != 0;
      const T* grad = at<T>(p.grad, row, offset);
      const bool masked = form == SumForm::kAddRelu && p.mask != nullptr;
      const uint8_t* mask =
          masked ? p.mask + row * mask_bytes(p.size) + offset / kMaskBits : nullptr;
      const T* y = form == SumForm::kAddRelu && !masked ? at<T>(p.y, row, offset) : nullptr;
      T* d_x = p.d_x.data == nullptr ? nullptr : at<T>(p.d_x, row, offset);
      T* d_branch = slot < 0 ? nullptr : at<T>(p.d_branch, slot, offset);
      const Factor* factor = nullptr;
      if (p.gate_sums != nullptr) {
        part = p.gate_sums + row * per_row + offset / kSegment;
        const int64_t factor_row =
            existing(p.factor_row == nullptr || slot < 0 ? slot : p.factor_row[row], p.factor.rows);
        if (factor_row >= 0) factor = at<Factor>(p.factor, factor_row, offset);
      }
      for_chunks<chunk>(count, [&](int i) {
        const int64_t left = count - i;
        // All loads before what waits for them.
        uint32_t bits = 0;
        if constexpr (form == SumForm::kAddRelu) {
          bits = masked ? mask[i / kMaskBits] : passing(load<aligned, chunk>(y + i, left));
        }
        Chunk<T, chunk> passed = load<aligned, chunk>(grad + i, left);
        Chunk<Factor, chunk> by;
        if (factor != nullptr) by = load<aligned, chunk>(factor + i, left);
        if constexpr (form == SumForm::kAddRelu) {
#pragma unroll
          for (int e = 0; e < chunk; ++e) {
            passed.v[e] = zero_unless(bits >> e & 1u, passed.v[e]);
          }
        }
        if (factor != nullptr) {
#pragma unroll
          for (int e = 0; e < chunk; ++e) {
            // Beyond the row's end the factor is 0, and so is what passed.
            partial = fma(widen(passed.v[e]), widen(by.v[e]), partial);
          }
        }
        if (d_branch != nullptr) {
          Chunk<T, chunk> share;
#pragma unroll
          for (int e = 0; e < chunk; ++e) {
            narrow(running ? widen(passed.v[e]) * gate : A{0}, &share.v[e]);
          }
          store<aligned>(d_branch + i, share, left);
        }
        if (d_x == nullptr) return;
        if (form == SumForm::kLerp && running) {
#pragma unroll
          for (int e = 0; e < chunk; ++e) {
            narrow(widen(passed.v[e]) * (A{1} - gate), &passed.v[e]);
          }
        }
        store<aligned>(d_x + i, passed, left);
      });
    }
    if (p.gate_sums != nullptr) write_sum(partial, part);
  });
}

// A warp for a row.
__global__ void __launch_bounds__(kThreads) sum_parts(GateSumParams p) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < p.rows; row += stride) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < p.parts; i += kWarp) sum += p.gate_sums[row * p.parts + i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) p.d_gate[row] = static_cast<float>(sum);
  }
}

// A block for a row. In whole words where rows are of whole words.
template <typename Word>
__global__ void __launch_bounds__(kThreads) clear_unowned(ClearParams p) {
  const int64_t words = p.row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t row = blockIdx.x; row < p.out.rows; row += gridDim.x) {
    if (p.owner[row] >= 0) continue;
    Word* out = static_cast<Word*>(p.out.data) + row * words;
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) out[i] = Word{};
  }
}

}  // namespace

cudaError_t launch(const BackwardParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.size == 0) return cudaSuccess;
  return by_type(p.type, [&](auto element) {
    using T = decltype(element);
    return by_form(p.form, [&](auto form) {
      using Factor = std::conditional_t<form() == SumForm::kLerp, Accumulated<T>, T>;
      const bool all_aligned =
          p.size % kSumChunk<T, form()> == 0 && rows_aligned<T>(p.grad, p.size) &&
          rows_aligned<T>(p.d_x, p.size) && rows_aligned<T>(p.d_branch, p.size) &&
          (form() != SumForm::kAddRelu || p.mask != nullptr || rows_aligned<T>(p.y, p.size)) &&
          (p.gate_sums == nullptr || rows_aligned<Factor>(p.factor, p.size));
      return by_alignment(all_aligned, [&](auto aligned) {
        const Layout layout = row_layout(p.rows, p.size, kSumChunk<T, form()>);
        backward_kernel<T, form(), aligned()><<<layout.grid, layout.block, 0, stream>>>(p);
        return cudaGetLastError();
      });
    });
  });
}

cudaError_t launch(const GateSumParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  constexpr int down = kThreads / kWarp;
  sum_parts<<<blocks_for(p.rows, down), dim3(kWarp, down), 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch(const ClearParams& p, cudaStream_t stream) {
  if (p.out.rows == 0 || p.row_bytes == 0) return cudaSuccess;
  const unsigned blocks = blocks_for(p.out.rows, 1);
  const bool aligned = reinterpret_cast<uintptr_t>(p.out.data) % sizeof(uint4) == 0 &&
                       p.row_bytes % sizeof(uint4) == 0;
  if (aligned) {
    clear_unowned<uint4><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    clear_unowned<char><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace layerprune
