// The GPU's kernels: what puts them on a stream of the current device. Nothing here waits, and
// nothing allocates. Each returns what the launch did.
#pragma once

#include <cuda_runtime_api.h>

#include "../parameters.h"

namespace layerprune {
namespace cuda {

cudaError_t launch(const ForwardParams& params, cudaStream_t stream);
cudaError_t launch(const BackwardParams& params, cudaStream_t stream);
cudaError_t launch(const GateSumParams& params, cudaStream_t stream);
cudaError_t launch(const ClearParams& params, cudaStream_t stream);
cudaError_t launch(const GatherParams& params, cudaStream_t stream);
cudaError_t launch(const ScatterAddParams& params, cudaStream_t stream);
cudaError_t launch(const DifferenceParams& params, cudaStream_t stream);
cudaError_t launch(const InverseParams& params, cudaStream_t stream);
cudaError_t launch(const FactorRowsParams& params, cudaStream_t stream);
cudaError_t launch(const DrawParams& params, cudaStream_t stream);

// Needs room for `step_scratch` numbers.
cudaError_t launch(const StepParams& params, float* scratch, cudaStream_t stream);
int64_t step_scratch(int64_t sections);

}  // namespace cuda
}  // namespace layerprune
