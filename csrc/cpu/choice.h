// Which of the kernels a process runs.
#pragma once

#include <cstdlib>
#include <cstring>

namespace layerprune {

// Whether the processor has x86-64-v3. The variable with which torch restricts its own kernels
// (ATEN_CPU_CAPABILITY=default) restricts these.
inline bool runs_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  // Not every compiler can ask for F16C, which every processor with AVX2 has.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         (wish == nullptr || std::strcmp(wish, "default") != 0);
#else
  return false;
#endif
}

}  // namespace layerprune
