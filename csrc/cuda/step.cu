// Operation 4 on a GPU: a block for a section's evidence and, where sections compete, the block
// that ends last for the competition. One launch: no block waits for another.
#include "launch.h"
#include "select.cuh"

namespace layerprune {
namespace cuda {
namespace {

// What the last block needs of every section.
struct Standings {
  float* moved;        // where theta would move
  float* excess;       // of a section that should fall, else 0
  float* rises;        // 1 where a section that is held may rise, else 0
  unsigned* finished;  // blocks
};

struct Evidence {
  float sum;
  float rows;
};

// Of one section, in thread 0.
__device__ Evidence counted_sum(const StepParams& p, int64_t section) {
  __shared__ float sums[kThreads / kWarp];
  __shared__ uint32_t numbers[kThreads / kWarp];
  const float* slope = p.slope + section * p.rows;
  const bool* counted = p.counted + section * p.rows;
  float sum = 0.0f;
  uint32_t number = 0;
  for (int64_t i = threadIdx.x; i < p.rows; i += blockDim.x) {
    sum += counted[i] ? slope[i] : 0.0f;
    number += counted[i];
  }
  sum = warp_sum(sum);
  number = warp_sum(number);
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = sum;
    numbers[threadIdx.x / kWarp] = number;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / kWarp; ++i) {
      sum += sums[i];
      number += numbers[i];
    }
  }
  return {sum, static_cast<float>(number)};
}

// Brings the section's statistics up to date; returns where its theta would move.
__device__ float take_in(const StepParams& p, int64_t section, Evidence evidence,
                         Statistics* statistics) {
  float* s = p.statistics + section;
  const int64_t n = p.sections;
  *statistics = {s[0], s[n], s[2 * n], s[3 * n], s[4 * n]};
  if (evidence.rows == 0.0f) return p.theta[section];
  const float estimate = evidence.sum / evidence.rows;
  const Statistics now = with_evidence(*statistics, estimate, evidence.rows, p.options.decay);
  *statistics = now;
  s[0] = now.steps;
  s[n] = now.rows;
  s[2 * n] = now.squares;
  s[3 * n] = now.mean;
  s[4 * n] = now.deviations;
  return projected_theta(p.theta[section], estimate, p.penalty[section],
                         row_variance(now) / evidence.rows, p.options);
}

// Those in play keep their places while they should fall; free places go to the largest excess, of
// equal ones to the first. Reads past the first cache, which may hold what others have overwritten.
__device__ void compete(const StepParams& p, const Standings& standings) {
  __shared__ SelectRoom room;
  const auto rank_of = [&](int64_t section, uint64_t* key) {
    const float excess = __ldcg(standings.excess + section);
    const uint32_t lag = 0x7FFFFFFFu - __float_as_uint(excess);  // of positive numbers, as bits
    *key = rank_key(lag | (p.in_play[section] ? 0u : 0x80000000u), static_cast<uint32_t>(section));
    return excess > 0.0f;
  };
  const uint64_t bound = least_bound(p.sections, p.max_descending, rank_of, room);
  for (int64_t section = threadIdx.x; section < p.sections; section += blockDim.x) {
    uint64_t rank;
    const bool plays = rank_of(section, &rank) && rank < bound;
    p.in_play[section] = plays;
    if (plays || __ldcg(standings.rises + section) != 0.0f) {
      p.theta[section] = __ldcg(standings.moved + section);
    }
  }
}

__global__ void __launch_bounds__(kThreads) step_kernel(StepParams p, Standings standings) {
  __shared__ bool last;
  const int64_t section = blockIdx.x;
  const Evidence evidence = counted_sum(p, section);
  const bool competition = p.max_descending >= 0;
  if (threadIdx.x == 0) {
    Statistics now;
    const float moved = take_in(p, section, evidence, &now);
    const bool free = p.free[section];
    if (competition) {
      const float penalty = p.penalty[section], over = excess(now, penalty);
      const bool falls = free && now.steps > 0.0f && over > 0.0f;
      const bool rises = free && excess_bound(now, penalty, p.options.confidence) < 0.0f;
      standings.moved[section] = moved;
      standings.excess[section] = falls ? over : 0.0f;
      standings.rises[section] = rises ? 1.0f : 0.0f;
      __threadfence();
      // Who is last is left to chance; what it then does is not.
      last = atomicAdd(standings.finished, 1u) == gridDim.x - 1;
    } else {
      p.in_play[section] = free;
      if (free) p.theta[section] = moved;
    }
  }
  if (!competition) return;
  __syncthreads();
  if (!last) return;
  __threadfence();
  compete(p, standings);
}

}  // namespace

int64_t step_scratch(int64_t sections) { return 3 * sections + 1; }

cudaError_t launch(const StepParams& p, float* scratch, cudaStream_t stream) {
  const int64_t n = p.sections;
  if (n == 0) return cudaSuccess;
  const Standings standings{scratch, scratch + n, scratch + 2 * n,
                            reinterpret_cast<unsigned*>(scratch + 3 * n)};
  if (p.max_descending >= 0) {
    const cudaError_t cleared = cudaMemsetAsync(standings.finished, 0, sizeof(unsigned), stream);
    if (cleared != cudaSuccess) return cleared;
  }
  step_kernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(p, standings);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace layerprune
