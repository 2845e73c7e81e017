// In place of csrc/bindings/stream.h: there is neither device nor stream.
#pragma once

#include <stdexcept>

#include "../cuda/launch.h"

namespace layerprune {

template <typename Params, typename... More>
void launch_on(int32_t, const Params& params, More... more) {
  if (cuda::launch(params, more..., nullptr) != cudaSuccess) {
    throw std::runtime_error("a launch failed");
  }
}

}  // namespace layerprune
