// The kernels for any processor.
#include <cstring>
#include <type_traits>

#include "table.h"

namespace layerprune {
namespace baseline {
#include "kernels.h"
}  // namespace baseline

constexpr CpuKernels kBaselineKernels = baseline::kernels();

}  // namespace layerprune
