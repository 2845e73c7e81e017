// Launches on the current stream of the tensors' device. Needs USE_CUDA, which setup.py defines.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../cuda/launch.h"

namespace layerprune {

template <typename Params, typename... More>
void launch_on(int32_t device, const Params& params, More... more) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  STD_CUDA_CHECK(cuda::launch(params, more..., static_cast<cudaStream_t>(stream)));
}

}  // namespace layerprune
