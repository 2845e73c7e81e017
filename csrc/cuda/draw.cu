// Operation 1 on a GPU: a block draws a section, all sections in one launch.
//
// A row's words cost less than memory to keep them in: they are computed anew wherever they are
// needed. What a row is follows from three bounds of its rank keys, so nothing but the outputs is
// written.
#include "launch.h"
#include "sort.cuh"

namespace layerprune {
namespace cuda {
namespace {

// What decides about the rows of a section.
struct Rules {
  Stream stream;
  uint32_t section;
  uint32_t first_row;
  bool systematic;
  float theta;
  float probe_rate;
  uint64_t probe_below = 0;  // bounds of keys, by word 1 and then by word 0
  uint64_t open_below = 0;
  uint64_t padding_below = 0;

  __device__ Words words(int64_t row) const {
    return row_words(stream, section, first_row + static_cast<uint32_t>(row));
  }
};

// What a row is under them.
struct Row {
  uint64_t key0;
  uint64_t key1;
  bool probe;
  bool open;  // with gate 1
  bool runs;

  __device__ Row(const Rules& rules, int64_t row, const Words& words)
      : key0(rank_key(words.word[0], static_cast<uint32_t>(row))),
        key1(rank_key(words.word[1], static_cast<uint32_t>(row))) {
    probe = rules.systematic ? key1 < rules.probe_below
                             : independent_probe(rules.probe_rate, words.word[1]);
    open = !probe && (rules.systematic ? key0 < rules.open_below
                                       : independent_gate(rules.theta, words.word[3]) > 0.0f);
    runs = probe || open || key0 < rules.padding_below;
  }
};

struct Room {
  SelectRoom select;
  SortRoom sort;
  uint32_t warp_counts[kMostThreads / kWarp];
  uint32_t needed;
};

// How many threads of the block before this one have the flag; `all`: of the whole block.
__device__ uint32_t flagged_before(bool flag, uint32_t* warp_counts, uint32_t* all) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t votes = __ballot_sync(0xFFFFFFFFu, flag);
  if (lane == 0) warp_counts[warp] = __popc(votes);
  __syncthreads();
  uint32_t before = __popc(votes & ((1u << lane) - 1u));
  *all = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += warp_counts[w];
    *all += warp_counts[w];
  }
  __syncthreads();
  return before;
}

// Bounds of the systematic scheme; returns how many rows have an open gate.
__device__ int64_t choose_systematic(const DrawParams& p, Rules& rules, SelectRoom& room) {
  const Words reserved = row_words(rules.stream, rules.section, kReservedRow);
  const SystematicCounts counts = systematic_counts(rules.theta, rules.probe_rate, p.batch,
                                                    reserved, p.min_rows, p.row_multiple);
  const auto by_word1 = [&](int64_t row, uint64_t* key) {
    *key = Row(rules, row, rules.words(row)).key1;
    return true;
  };
  const auto others_by_word0 = [&](int64_t row, uint64_t* key) {
    const Row found(rules, row, rules.words(row));
    *key = found.key0;
    return !found.probe;
  };
  rules.probe_below = least_bound(p.batch, counts.probes, by_word1, room);
  rules.open_below = least_bound(p.batch, counts.open, others_by_word0, room);
  return counts.probes + counts.open;
}

// How many rows have an open gate under the independent scheme.
__device__ int64_t count_independent(const DrawParams& p, const Rules& rules, uint32_t* count) {
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  for (int64_t first = 0; first < p.batch; first += blockDim.x) {
    const int64_t row = first + threadIdx.x;
    bool needed = false;
    if (row < p.batch) {
      const Row found(rules, row, rules.words(row));
      needed = found.probe || found.open;
    }
    const int many = __syncthreads_count(needed);
    if (threadIdx.x == 0) *count += many;
  }
  __syncthreads();
  return *count;
}

// The gates of the probes under the systematic scheme. `keys` and `other` are room for a number
// each row.
__device__ void stratify(const DrawParams& p, const Rules& rules, uint64_t* keys, uint64_t* other,
                         float* gates, Room& room) {
  uint32_t count = 0;
  for (int64_t first = 0; first < p.batch; first += blockDim.x) {
    const int64_t row = first + threadIdx.x;
    const Row found(rules, row, rules.words(row));
    const bool probe = row < p.batch && found.probe;
    uint32_t all;
    const uint32_t place = count + flagged_before(probe, room.warp_counts, &all);
    if (probe) keys[place] = found.key1;
    count += all;
  }
  __syncthreads();
  sort_by_upper_word(keys, other, count, room.sort);
  for (uint32_t rank = threadIdx.x; rank < count; rank += blockDim.x) {
    const uint32_t row = row_of_key(keys[rank]);
    gates[row] = stratified_probe(rank, count, rules.words(row).word[2]);
  }
  __syncthreads();
}

// Writes what follows from the rules, but for the gates of probes under the systematic scheme.
__device__ void write_section(const DrawParams& p, const Rules& rules, Room& room) {
  const int64_t offset = rules.section * p.batch;
  int64_t running = 0, probes = 0;
  for (int64_t first = 0; first < p.batch; first += blockDim.x) {
    const int64_t row = first + threadIdx.x;
    const bool inside = row < p.batch;
    const Words words = rules.words(row);
    const Row found(rules, row, words);
    uint32_t all_running, all_probes;
    const int64_t place =
        running + flagged_before(inside && found.runs, room.warp_counts, &all_running);
    const int64_t probe_place =
        probes + flagged_before(inside && found.probe, room.warp_counts, &all_probes);
    running += all_running;
    probes += all_probes;
    if (!inside) continue;
    p.slots[offset + row] = found.runs ? static_cast<int32_t>(place) : -1;
    if (found.runs) p.rows[offset + place] = row;
    if (found.probe) p.probes[offset + probe_place] = row;
    if (!found.probe) p.gates[offset + row] = found.open ? 1.0f : 0.0f;
    if (found.probe && !rules.systematic) {
      p.gates[offset + row] = clamp_probe(uniform(words.word[2]));
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.batch; i += blockDim.x) {
    if (i >= running) p.rows[offset + i] = -1;
    if (i >= probes) p.probes[offset + i] = -1;
  }
  if (threadIdx.x == 0) {
    p.counts[2 * int64_t{rules.section}] = running;
    p.counts[2 * int64_t{rules.section} + 1] = probes;
  }
}

// Nobody has looked at the values: one outside of [0, 1] counts as the nearest inside.
__device__ float probability(float value) { return fminf(fmaxf(value, 0.0f), 1.0f); }

__global__ void __launch_bounds__(kMostThreads) draw_kernel(DrawParams p) {
  __shared__ Room room;
  for (int64_t section = blockIdx.x; section < p.sections; section += gridDim.x) {
    Rules rules{stream_of(p.rng_state),        static_cast<uint32_t>(section),
                first_row_of(p.rng_state),     p.systematic,
                probability(p.theta[section]), probability(p.probe_rate[section])};
    const int64_t needed = p.systematic ? choose_systematic(p, rules, room.select)
                                        : count_independent(p, rules, &room.needed);
    const int64_t padding = running_count(needed, p.min_rows, p.row_multiple, p.batch) - needed;
    const auto closed_by_word0 = [&](int64_t row, uint64_t* key) {
      const Row found(rules, row, rules.words(row));
      *key = found.key0;
      return !found.probe && !found.open;
    };
    // Set when it is found: until then no row is padding.
    rules.padding_below = least_bound(p.batch, padding, closed_by_word0, room.select);
    if (p.systematic && rules.probe_below > 0) {
      // The lists are written last; until then they are room for the keys.
      const int64_t offset = section * p.batch;
      stratify(p, rules, reinterpret_cast<uint64_t*>(p.rows + offset),
               reinterpret_cast<uint64_t*>(p.probes + offset), p.gates + offset, room);
    }
    write_section(p, rules, room);
  }
}

}  // namespace

cudaError_t launch(const DrawParams& p, cudaStream_t stream) {
  if (p.sections == 0) return cudaSuccess;
  int threads = kWarp;
  while (threads < p.batch && threads < kMostThreads) threads *= 2;
  draw_kernel<<<blocks_for(p.sections, 1), threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace layerprune
