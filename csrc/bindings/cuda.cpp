// The operators for tensors on a GPU: launches on the current stream of the tensors' device.
#include "device.h"
#include "operators.h"
#include "stream.h"

namespace layerprune {

void prepare(const Tensor&) {}

// Values are on the device: see device.h.
void check_probabilities(const char*, const Tensor&) {}
void check_positive(const char*, const Tensor&) {}
void check_first_row(const Tensor&, int64_t) {}
void check_distinct_rows(const char*, const Tensor&, int64_t) {}
void check_distinct_slots(const Tensor&, int64_t) {}

void run(ForwardParams p, int32_t device) { launch_on(device, p); }
void run(BackwardParams p, int32_t device) { launch_on(device, p); }
void run(const GateSumParams& p, int32_t device) { launch_on(device, p); }
void run(const ClearParams& p, int32_t device) { launch_on(device, p); }
void run(GatherParams p, int32_t device) { launch_on(device, p); }
void run(const ScatterAddParams& p, int32_t device) { launch_on(device, p); }
void run(const DifferenceParams& p, int32_t device) { launch_on(device, p); }
void run(const InverseParams& p, int32_t device) { launch_on(device, p); }
void run(const FactorRowsParams& p, int32_t device) { launch_on(device, p); }
void run(const DrawParams& p, int32_t device) { launch_on(device, p); }
void run(const StepParams& p, float* scratch, int32_t device) { launch_on(device, p, scratch); }

int64_t step_scratch(int64_t sections) { return cuda::step_scratch(sections); }

STABLE_TORCH_LIBRARY_IMPL(layerprune, CUDA, m) {
  register_operators(m);
  register_masked_operators(m);
}

}  // namespace layerprune
