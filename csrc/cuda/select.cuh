// The least keys of many, found by a block without sorting them: digit by digit from the highest
// one, each by a histogram. The order in which threads count changes no count.
#pragma once

#include "grid.cuh"

namespace layerprune {
namespace cuda {

constexpr int kDigits = 256;
constexpr int kDigitBits = 8;

__device__ inline int digit_of(uint64_t key, int shift) {
  return static_cast<int>(key >> shift) & (kDigits - 1);
}

// Sum over a warp's lanes up to this one.
__device__ inline uint32_t warp_prefix(uint32_t value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, value, lanes);
    if (lane >= lanes) value += other;
  }
  return value;
}

// Replaces counts of digits by the counts of all lower digits. By one warp.
__device__ inline void counts_before(uint32_t* counts) {
  constexpr int per_lane = kDigits / kWarp;
  uint32_t* own = counts + threadIdx.x % kWarp * per_lane;
  uint32_t sum = 0;
  for (int i = 0; i < per_lane; ++i) sum += own[i];
  uint32_t before = warp_prefix(sum) - sum;
  for (int i = 0; i < per_lane; ++i) {
    const uint32_t count = own[i];
    own[i] = before;
    before += count;
  }
}

struct SelectRoom {
  uint32_t counts[kDigits + 1];
  int digit;
};

// The bound below which exactly `least` keys lie, or all of them if there are fewer. Of the items
// 0, ..., count - 1, fewer than 2**32, those count for which `key_of(item, &key)` is true; keys
// differ, and none has all bits set. Called by the whole block with the same arguments.
template <typename KeyOf>
__device__ uint64_t least_bound(int64_t count, int64_t least, KeyOf key_of, SelectRoom& room) {
  if (least <= 0) return 0;
  if (least > count) return ~uint64_t{0};
  auto wanted = static_cast<uint32_t>(least);  // of the keys that begin with `prefix`
  uint64_t prefix = 0;
  for (int shift = 64 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int i = threadIdx.x; i <= kDigits; i += blockDim.x) room.counts[i] = 0;
    if (threadIdx.x == 0) room.digit = -1;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      uint64_t key;
      if (!key_of(i, &key)) continue;
      const bool begins = shift == 64 - kDigitBits || key >> (shift + kDigitBits) == prefix;
      if (begins) atomicAdd(&room.counts[digit_of(key, shift)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      uint32_t total = 0;
      for (int i = threadIdx.x; i < kDigits; i += kWarp) total += room.counts[i];
      total = warp_sum(total);
      counts_before(room.counts);
      if (threadIdx.x == 0) room.counts[kDigits] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) {
      if (room.counts[i] < wanted && wanted <= room.counts[i + 1]) room.digit = i;
    }
    __syncthreads();
    const int digit = room.digit;
    const uint32_t before = digit < 0 ? 0 : room.counts[digit];
    const uint32_t until = digit < 0 ? 0 : room.counts[digit + 1];
    __syncthreads();  // before the room is used again
    if (digit < 0) return ~uint64_t{0};
    prefix = prefix << kDigitBits | static_cast<uint64_t>(digit);
    if (until == wanted) {  // every key that begins so
      const uint64_t bound = (prefix + 1) << shift;
      return bound == 0 ? ~uint64_t{0} : bound;
    }
    wanted -= before;
  }
  return ~uint64_t{0};
}

}  // namespace cuda
}  // namespace layerprune
