#include "choice.h"

#include "table.h"

namespace layerprune {

const CpuKernels& cpu_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool modern = runs_avx2();
  if (modern) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace layerprune
