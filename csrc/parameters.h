// What the bindings hand to the kernels: plain structures and launch prototypes, free of torch.
#pragma once

#include <cstdint>

#include "gate_math.h"

namespace layerprune {

enum class ElementType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Rows of `size` elements, each dense in memory, `stride` elements apart (0 for a broadcast row).
struct RowsIn {
  const void* data = nullptr;
  int64_t stride = 0;
};

struct RowsOut {
  void* data = nullptr;
  int64_t stride = 0;
};

enum class SumForm { kAdd, kAddRelu, kLerp };

// y_b = act(x_b + gate_b * branch[slot_b]), or the linear interpolation.
struct ForwardParams {
  ElementType type;
  SumForm form;
  bool non_temporal;  // whether results are written past the caches
  int64_t rows;
  int64_t size;
  RowsIn x;
  RowsIn branch;
  RowsOut y;
  const float* gate;
  const int32_t* slot;  // null: the rows correspond
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
  RowsIn y;  // kAddRelu only
  RowsIn factor;
  const int64_t* factor_row;  // row of `factor` for each row of grad or -1; null: they correspond
  RowsOut d_x;
  RowsOut d_branch;
  const float* gate;
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

// One draw of the gates of all sections; see layerprune.ops.sample_gates for the outputs.
struct DrawParams {
  Stream stream;
  uint32_t first_row;  // global row of the batch's first
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

static constexpr int64_t segments(int64_t size) { return (size + kSegment - 1) / kSegment; }

// The kernels of one instruction set. Those on rows take a range of the rows * segments(size)
// units.
struct CpuKernels {
  void (*forward)(const ForwardParams&, int64_t begin, int64_t end);
  void (*backward)(const BackwardParams&, int64_t begin, int64_t end);
  void (*gather)(const GatherParams&, int64_t begin, int64_t end);
  void (*scatter_add)(const ScatterAddParams&, int64_t begin, int64_t end);
  void (*difference)(const DifferenceParams&, int64_t begin, int64_t end);
  // Words of rows first_row, ..., first_row + count - 1, one array for each word.
  void (*row_words)(Stream stream, uint32_t section, uint32_t first_row, int64_t count,
                    uint32_t* const words[4]);
  // taken[i] = whether words[i] is among the `least` smallest of those that are not excluded, of
  // equal ones the first. `eligible` are not excluded, at least `least`; the words of the others
  // are 0xFFFFFFFF. The words are random: the search assumes that they are spread evenly, its
  // result does not.
  void (*mark_least)(const uint32_t* words, const uint8_t* excluded, int64_t count,
                     int64_t eligible, int64_t least, uint8_t* taken);
  // The statistics of some sections under this step's evidence, and where theta would move.
  void (*step)(const StepParams&, float* moved, int64_t begin, int64_t end);
  // What the competition asks of every section: its excess and the bound of it.
  void (*standing)(const StepParams&, float* excess, float* bound);
};

extern const CpuKernels kBaselineKernels;
extern const CpuKernels kAvx2Kernels;

// The best set that this processor runs.
const CpuKernels& cpu_kernels();

void draw_sections(const DrawParams& params, int64_t begin, int64_t end);

// The end of a step, when every section's evidence is in: who is in play, and what moves.
void compete(const StepParams& params, const float* moved);

}  // namespace layerprune
