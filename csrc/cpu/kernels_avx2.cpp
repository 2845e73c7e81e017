// The kernels for x86-64-v3 (AVX2, FMA, F16C). The instruction set is chosen in this file, so that
// the rest of the library runs on any processor and no compiler flag decides for the whole build.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define LAYERPRUNE_AVX2
// The project's own headers come behind this: their functions must be of the same instruction set
// to be inlined. The system's came before: the linker may merge their functions with others'.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "table.h"

namespace layerprune {
namespace avx2 {
#include "kernels.h"
}  // namespace avx2

constexpr CpuKernels kAvx2Kernels = avx2::kernels();
}  // namespace layerprune

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
