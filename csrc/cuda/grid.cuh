// How threads are laid over rows: a block has a few segments of rows at a time, and a segment the
// block's threads of one threadIdx.y.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../parameters.h"

namespace layerprune {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = int64_t{1} << 30;  // more work is done in turns

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

struct Layout {
  dim3 grid;
  dim3 block;
};

// Segments, and of rows without elements one: what is done once a row is done for them too.
LAYERPRUNE_INLINE int64_t units_per_row(int64_t size) { return size > 0 ? segments(size) : 1; }

// For rows of `size` elements, of which a thread takes `chunk` at a time: no more threads a segment
// than have work, so that short rows share a block.
inline Layout row_layout(int64_t rows, int64_t size, int chunk) {
  const int64_t longest = size < kSegment ? size : kSegment;
  int across = kWarp;
  while (across < kThreads && int64_t{across} * chunk < longest) across *= 2;
  const int down = kThreads / across;
  return {dim3(blocks_for(rows * units_per_row(size), down)), dim3(across, down)};
}

// Calls `work(row, offset, count)` in every thread of each segment, and `work(-1, 0, 0)` in threads
// without one while others of their block have: the block's threads meet in barriers.
template <typename Work>
__device__ inline void for_segments(int64_t rows, int64_t size, Work work) {
  const int64_t per_row = units_per_row(size), units = rows * per_row;
  const int64_t stride = int64_t{gridDim.x} * blockDim.y;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < units; first += stride) {
    const int64_t unit = first + threadIdx.y;
    if (unit >= units) {
      work(int64_t{-1}, int64_t{0}, int64_t{0});
      continue;
    }
    // A division of 64 bits costs as much as a good part of the segment.
    const int64_t row = per_row == 1 ? unit
                        : units >> 32 == 0
                            ? static_cast<uint32_t>(unit) / static_cast<uint32_t>(per_row)
                            : unit / per_row;
    const int64_t offset = (unit - row * per_row) * kSegment;
    work(row, offset, size - offset < kSegment ? size - offset : kSegment);
  }
}

// Calls `work(i)` for the chunks of a segment that are this thread's, by their first element.
template <int chunk, typename Work>
__device__ inline void for_chunks(int64_t count, Work work) {
  const int step = static_cast<int>(blockDim.x) * chunk;
  // Not unrolled: many threads hide the memory's delay, as long as each has few registers.
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) * chunk; i < count; i += step) work(i);
}

// Calls `work(i)` for 0 <= i < count, over all threads of the grid.
template <typename Work>
__device__ inline void for_each(int64_t count, Work work) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) work(i);
}

// Sum over a warp, in an order that depends on nothing but the lane.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_down_sync(0xFFFFFFFFu, value, lanes);
  }
  return value;  // in lane 0
}

template <typename T>
__device__ inline const T* at(RowsIn rows, int64_t row, int64_t offset) {
  return static_cast<const T*>(rows.data) + row * rows.stride + offset;
}
template <typename T>
__device__ inline T* at(RowsOut rows, int64_t row, int64_t offset) {
  return static_cast<T*>(rows.data) + row * rows.stride + offset;
}

// A row's gate, given or drawn: the words cost less than another launch and than memory for them.
template <typename Params>
__device__ inline float gate_of(const Params& p, int64_t row) {
  const SampledGates& s = p.sampled;
  if (s.rng_state == nullptr) return p.gate[row];
  const uint32_t global_row = first_row_of(s.rng_state) + static_cast<uint32_t>(row);
  const Words words = row_words(stream_of(s.rng_state), s.section, global_row);
  return independent_gate(*s.theta, words.word[3]);
}

// The row, or -1 where there is no such row.
__device__ inline int64_t existing(int64_t row, int64_t rows) {
  return row_exists(row, rows) ? row : -1;
}

// Whether every row begins on a 16-byte boundary and is of whole ones.
template <typename T, typename Rows>
bool rows_aligned(const Rows& rows, int64_t size) {
  constexpr int64_t boundary = 16;
  const int64_t width = sizeof(T);
  return reinterpret_cast<uintptr_t>(rows.data) % boundary == 0 &&
         rows.stride * width % boundary == 0 && size * width % boundary == 0;
}

}  // namespace cuda
}  // namespace layerprune
