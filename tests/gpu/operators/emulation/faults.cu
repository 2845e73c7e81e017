// Kernels with faults that the emulation has to show.
#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace {

__global__ void part_of_the_block_waits() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_warp_votes() {
  if (threadIdx.x < 16) __ballot_sync(0xFFFFFFFFu, true);
}

__global__ void the_last_wins(unsigned* block, unsigned* thread) {
  *block = blockIdx.x;
  if (blockIdx.x == 0) *thread = threadIdx.x;
}

__global__ void reads_what_nobody_wrote(float* found) {
  __shared__ float value;
  *found = value;
}

std::string message;

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// What is said of a kernel whose threads do not meet; nothing if it went by
// unseen.
EXPORTED const char* barrier_fault(int number) {
  message.clear();
  try {
    if (number == 0) part_of_the_block_waits<<<1, 64, 0, nullptr>>>();
    if (number == 1) two_barriers<<<1, 64, 0, nullptr>>>();
    if (number == 2) half_a_warp_votes<<<1, 32, 0, nullptr>>>();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

EXPORTED void order_fault(unsigned* block, unsigned* thread) {
  the_last_wins<<<8, 64, 0, nullptr>>>(block, thread);
}

EXPORTED float memory_fault() {
  float found = 0;
  reads_what_nobody_wrote<<<1, 32, 0, nullptr>>>(&found);
  return found;
}
