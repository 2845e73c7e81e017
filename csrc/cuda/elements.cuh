// Elements in the accumulation type, and 16 bytes of them at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "../parameters.h"

namespace layerprune {
namespace cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using Accumulated = typename Accumulation<T>::type;

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Half value) { return __half2float(value); }
__device__ inline float widen(BFloat16 value) { return __bfloat162float(value); }

__device__ inline void narrow(double value, double* to) { *to = value; }
__device__ inline void narrow(float value, float* to) { *to = value; }
__device__ inline void narrow(float value, Half* to) { *to = __float2half_rn(value); }
__device__ inline void narrow(float value, BFloat16* to) { *to = __float2bfloat16_rn(value); }

// A comparison with NaN is false: NaN passes.
template <typename T>
__device__ inline T relu(T value) {
  T zero;
  narrow(0, &zero);
  return widen(value) < 0 ? zero : value;
}
template <typename T>
__device__ inline bool passes(T y) {
  return !(widen(y) <= 0);
}
template <typename T>
__device__ inline T zero_unless(bool passes, T value) {
  T zero;
  narrow(0, &zero);
  return passes ? value : zero;
}

// As many elements of any type as fill 16 bytes of type T: what a thread works on at a time, but
// for ReLU's sums, where that is a byte of the mask.
template <typename T>
constexpr int kChunk = 16 / sizeof(T);

template <typename T, SumForm form>
constexpr int kSumChunk = form == SumForm::kAddRelu ? kMaskBits : kChunk<T>;

template <typename T, int n>
struct Chunk {
  T v[n];
};

// A bit for every element that ReLU lets through, the first one's the lowest.
template <typename T>
__device__ inline uint8_t passing(const Chunk<T, kMaskBits>& y) {
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < kMaskBits; ++e) bits |= (passes(y.v[e]) ? 1u : 0u) << e;
  return static_cast<uint8_t>(bits);
}

// `left` elements from p on are in the row; others are not read. Where `aligned`, p is on a 16-byte
// boundary and all n are in the row.
template <bool aligned, int n, typename T>
__device__ inline Chunk<T, n> load(const T* __restrict__ p, int64_t left) {
  Chunk<T, n> chunk;
  if constexpr (aligned) {
    constexpr int parts = n * sizeof(T) / sizeof(uint4);
    uint4 words[parts];
#pragma unroll
    for (int i = 0; i < parts; ++i) words[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&chunk, words, sizeof chunk);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      narrow(0, &chunk.v[i]);
      if (i < left) chunk.v[i] = p[i];
    }
  }
  return chunk;
}

// As a plain assignment, the compiler would at times write the elements one by one.
__device__ inline void store_words(uint4* p, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else  // tests run kernels on the host
  *p = words;
#endif
}

template <bool aligned, int n, typename T>
__device__ inline void store(T* __restrict__ p, const Chunk<T, n>& chunk, int64_t left) {
  if constexpr (aligned) {
    constexpr int parts = n * sizeof(T) / sizeof(uint4);
    uint4 words[parts];
    memcpy(words, &chunk, sizeof chunk);
#pragma unroll
    for (int i = 0; i < parts; ++i) store_words(reinterpret_cast<uint4*>(p) + i, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (i < left) p[i] = chunk.v[i];
    }
  }
}

}  // namespace cuda
}  // namespace layerprune
