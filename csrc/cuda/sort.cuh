// Keys in ascending order of some of their digits, by a block: a stable radix sort.
#pragma once

#include "select.cuh"

namespace layerprune {
namespace cuda {

constexpr int kMostThreads = 1024;  // of a block

struct SortRoom {
  uint32_t places[kDigits];  // of the next key with a digit
  uint32_t warp_places[kMostThreads / kWarp][kDigits];
};

// Moves the keys to `to` in the order of one digit; those with the same keep their order.
__device__ inline void sort_by_digit(const uint64_t* from, uint64_t* to, uint32_t count, int shift,
                                     SortRoom& room) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < kDigits; i += blockDim.x) room.places[i] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
    atomicAdd(&room.places[digit_of(from[i], shift)], 1u);
  }
  __syncthreads();
  if (threadIdx.x < kWarp) counts_before(room.places);
  for (uint32_t first = 0; first < count; first += blockDim.x) {
    for (int i = threadIdx.x; i < warps * kDigits; i += blockDim.x) {
      room.warp_places[i / kDigits][i % kDigits] = 0;
    }
    __syncthreads();
    const uint32_t i = first + threadIdx.x;
    const uint64_t key = i < count ? from[i] : 0;
    const int digit = i < count ? digit_of(key, shift) : kDigits;
    const uint32_t same = __match_any_sync(0xFFFFFFFFu, digit);
    const int before = __popc(same & ((1u << lane) - 1u));
    if (i < count && before == 0) room.warp_places[warp][digit] = __popc(same);
    __syncthreads();
    for (int d = threadIdx.x; d < kDigits; d += blockDim.x) {
      uint32_t place = room.places[d];
      for (int w = 0; w < warps; ++w) {
        const uint32_t found = room.warp_places[w][d];
        room.warp_places[w][d] = place;
        place += found;
      }
      room.places[d] = place;
    }
    __syncthreads();
    if (i < count) to[room.warp_places[warp][digit] + before] = key;
    __syncthreads();
  }
}

// Sorts keys that are in the order of their lower 32 bits. `other` is room for as many.
__device__ inline void sort_by_upper_word(uint64_t* keys, uint64_t* other, uint32_t count,
                                          SortRoom& room) {
  for (int shift = 32; shift < 64; shift += 2 * kDigitBits) {
    sort_by_digit(keys, other, count, shift, room);
    sort_by_digit(other, keys, count, shift + kDigitBits, room);
  }
}

}  // namespace cuda
}  // namespace layerprune
