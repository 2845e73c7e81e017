// The kernels of `CpuKernels`. Included inside a namespace of each instruction set, after the
// system's headers and table.h; nothing here may be a function that the linker merges with
// another's copy.

#include "lanes.h"

#include "gate_kernels.h"
#include "row_kernels.h"

// Evaluated by the compiler: no instruction of the set runs before it is chosen.
static constexpr CpuKernels kernels() {
  return {by_type<Forward, ForwardParams>,
          by_type<Backward, BackwardParams>,
          gather,
          by_type<ScatterAdd, ScatterAddParams>,
          by_type<Difference, DifferenceParams>,
          fill_row_words,
          mark_least,
          step,
          standing};
}
