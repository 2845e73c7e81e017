// The CPU's kernels: a table for each instruction set, and what needs none.
#pragma once

#include "../parameters.h"

namespace layerprune {

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
