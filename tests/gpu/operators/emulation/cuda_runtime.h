// In place of CUDA's: what csrc/cuda/ uses of it on the device, for kernels
// that run on the host. build.py rewrites `__shared__` and `<<<>>>`;
// emulation.cpp has the threads.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>  // not <cmath>: fma() of floats must be that of floats
#include <vector_types.h>

#include <cstdint>
#include <cstring>
#include <functional>

#undef __launch_bounds__
#define __launch_bounds__(threads)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulated {

struct Configuration {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared_bytes;
  cudaStream_t stream;
};

void launch(const Configuration& configuration, const std::function<void()>& kernel);

// Memory of the running block, filled with garbage when the block begins.
void* shared_memory(size_t bytes, void*& place);

// The variable that `tag`, a type of its own, stands for.
template <typename T, typename Tag>
T& shared(Tag) {
  static void* place = nullptr;
  return *static_cast<T*>(shared_memory(sizeof(T), place));
}

// Wait until all threads of the block, or all lanes of the warp, are at this
// line. They bring a word each. The block gets the number of those that are not
// 0; the warp gets the lanes' words.
int meet_block(int line, uint64_t word);
const uint64_t* meet_warp(int line, uint32_t mask, uint64_t word);

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <typename T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  static_assert(sizeof value <= sizeof word);
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
T shuffle(int line, uint32_t mask, T value, int from) {
  const uint64_t* words = meet_warp(line, mask, to_word(value));
  if (from >= 0 && from < 32) std::memcpy(&value, words + from, sizeof value);
  return value;
}

}  // namespace emulated

// The line of the call tells barriers apart.
#define EMULATED_LINE int line = __builtin_LINE()

inline void __syncthreads(EMULATED_LINE) { emulated::meet_block(line, 0); }
inline int __syncthreads_count(int predicate, EMULATED_LINE) {
  return emulated::meet_block(line, predicate != 0);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int lanes, EMULATED_LINE) {
  return emulated::shuffle(line, mask, value, emulated::lane() + lanes);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int lanes, EMULATED_LINE) {
  return emulated::shuffle(line, mask, value, emulated::lane() - lanes);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate, EMULATED_LINE) {
  const uint64_t* words = emulated::meet_warp(line, mask, predicate);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>(words[i]) << i;
  return votes;
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, EMULATED_LINE) {
  const uint64_t own = emulated::to_word(value);
  const uint64_t* words = emulated::meet_warp(line, mask, own);
  uint32_t same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<uint32_t>(words[i] == own) << i;
  return same;
}

#undef EMULATED_LINE

// Threads change places at barriers only: nothing comes in between.
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}
inline void __threadfence() {}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}
inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline uint32_t __float_as_uint(float value) {
  return static_cast<uint32_t>(emulated::to_word(value));
}
