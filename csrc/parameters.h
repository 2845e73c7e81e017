// What the bindings hand to the kernels of any device: plain structures, free of torch. Pointers
// are to memory of that device. The prototypes are in cpu/table.h and cuda/launch.h.
#pragma once

#include <cstdint>

#include "gate_math.h"

namespace layerprune {

enum class ElementType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// `rows` rows of `size` elements, each dense in memory, `stride` elements apart (0 for a broadcast
// row). The bindings of the CPU have checked every index of a row; the kernels of a GPU, whose
// indices nobody on the host can look at without waiting, take one out of range for none.
struct RowsIn {
  const void* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
};

struct RowsOut {
  void* data = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
};

LAYERPRUNE_INLINE bool row_exists(int64_t row, int64_t rows) { return row >= 0 && row < rows; }

enum class SumForm { kAdd, kAddRelu, kLerp };

// The gates of one section under the independent scheme without probes, drawn where they are used:
// no mask is kept for the backward.
struct SampledGates {
  const int64_t* rng_state;  // null: the gates are given
  uint32_t section;
  const float* theta;  // one
  float* gates;        // what was drawn, of the forward; null in the backward
};

// ReLU's mask: a bit for every element of a row that it lets through, in memory order and from the
// lowest bit of a byte on. See layerprune/ops/masked.py.
constexpr int kMaskBits = 8;

LAYERPRUNE_HOST_DEVICE static constexpr int64_t mask_bytes(int64_t size) {
  return (size + kMaskBits - 1) / kMaskBits;
}

// y_b = act(x_b + gate_b * branch[slot_b]), or the linear interpolation.
struct ForwardParams {
  ElementType type;
  SumForm form;
  bool non_temporal;  // on the CPU: whether results are written past the caches
  int64_t rows;
  int64_t size;
  RowsIn x;
  RowsIn branch;
  RowsOut y;
  const float* gate;  // unless they are sampled
  SampledGates sampled;
  const int32_t* slot;  // null: the rows correspond
  uint8_t* mask;        // of kAddRelu on a GPU, [rows, mask_bytes(size)]; null: not wanted
};

// Gradients of the same. `factor` is what a gate multiplies (the branch, or with lerp branch - x
// in the accumulation type), null if no gate needs a gradient.
struct BackwardParams {
  ElementType type;
  SumForm form;
  bool non_temporal;
  int64_t rows;
  int64_t size;
  RowsIn grad;
  RowsIn y;             // kAddRelu without a mask
  const uint8_t* mask;  // kAddRelu on a GPU, see ForwardParams; null: y tells
  RowsIn factor;
  const int64_t* factor_row;  // row of `factor` for each row of grad or -1; null: as of the branch
  RowsOut d_x;                // null: not wanted, where it is the incoming gradient
  RowsOut d_branch;
  const float* gate;  // unless they are sampled
  SampledGates sampled;
  const int32_t* slot;
  double* gate_sums;  // [rows, segments]: the gate's gradient in parts, see kSegment
};

// out_p = source[row_p]: zeros where row_p is -1.
struct GatherParams {
  int64_t element_bytes;
  bool non_temporal;
  int64_t rows;
  int64_t size;
  RowsIn source;
  RowsOut out;
  const int64_t* row;
};

// out[row_p] += source_p, the row_p distinct.
struct ScatterAddParams {
  ElementType type;
  int64_t rows;
  int64_t size;
  RowsIn source;
  RowsOut out;
  const int64_t* row;
};

// out_p = branch[branch_row_p] - x[x_row_p] in the accumulation type; zeros where x_row_p is -1.
struct DifferenceParams {
  ElementType type;
  int64_t rows;
  int64_t size;
  RowsIn branch;
  RowsIn x;
  RowsOut out;
  const int64_t* branch_row;
  const int64_t* x_row;
};

// inverse[index_i] = i, -1 for the others. The indices are of 32 bits where `narrow` is given, else
// `wide`; -1 stands for none.
struct InverseParams {
  const int32_t* narrow;
  const int64_t* wide;
  int64_t count;
  int64_t size;
  int64_t* inverse;
};

// Which row of the branch and which of x make a row of the gates' factor; -1 and -1 for none.
struct FactorRowsParams {
  const int64_t* asked;  // rows of x; null: the rows of the branch, in order
  const int32_t* slot;   // null: the rows correspond
  const int64_t* owner;  // row of x for each row of the branch or -1; null: they correspond
  int64_t count;
  int64_t batch;
  int64_t branch_rows;
  int64_t* branch_row;
  int64_t* x_row;
};

// One row of them.
LAYERPRUNE_INLINE void choose_factor_row(const FactorRowsParams& p, int64_t i) {
  const int64_t row = p.asked != nullptr ? p.asked[i] : p.owner != nullptr ? p.owner[i] : i;
  const int64_t place = p.asked == nullptr                              ? i
                        : row_exists(row, p.batch) && p.slot != nullptr ? p.slot[row]
                                                                        : row;
  const bool present = row_exists(row, p.batch) && row_exists(place, p.branch_rows);
  p.branch_row[i] = present ? place : -1;
  p.x_row[i] = present ? row : -1;
}

// Zeros in the rows of `out` that have no owner.
struct ClearParams {
  int64_t row_bytes;
  RowsOut out;  // rows without gaps
  const int64_t* owner;
};

// The gates' gradient: for each row the sum of its segments' parts.
struct GateSumParams {
  int64_t rows;
  int64_t parts;
  const double* gate_sums;
  float* d_gate;
};

// One draw of the gates of all sections; see layerprune.ops.sample_gates for the outputs.
struct DrawParams {
  const int64_t* rng_state;
  int64_t sections;
  int64_t batch;
  const float* theta;
  const float* probe_rate;
  int64_t min_rows;
  int64_t row_multiple;
  bool systematic;
  float* gates;
  int32_t* slots;
  int64_t* rows;
  int64_t* probes;
  int64_t* counts;
};

// One projected step of all sections; see layerprune.ops.projected_gate_step_.
struct StepParams {
  int64_t sections;
  int64_t rows;
  const float* slope;
  const bool* counted;
  const float* penalty;
  const bool* free;
  StepOptions options;
  int64_t max_descending;  // negative: no competition
  float* theta;
  float* statistics;  // [5, sections], the fields of Statistics
  bool* in_play;
};

// Rows are worked on in segments: the unit of parallel work and, whatever the number of threads, of
// summation.
constexpr int64_t kSegment = 8192;

LAYERPRUNE_HOST_DEVICE static constexpr int64_t segments(int64_t size) {
  return (size + kSegment - 1) / kSegment;
}

}  // namespace layerprune
