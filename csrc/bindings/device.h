// What the operators ask of the device that their library is for. cpu.cpp and cuda.cpp answer, each
// in its library.
#pragma once

#include "../parameters.h"
#include "checks.h"

namespace layerprune {

// Readies fresh memory for being written.
void prepare(const Tensor& fresh);

// These look at values, which the host can without waiting on the CPU only: for other devices they
// do nothing, and the kernels take an index that is out of range for none.
void check_probabilities(const char* name, const Tensor& values);
void check_positive(const char* name, const Tensor& values);
// Fails unless the batch's global rows, of which the state has the first, leave the reserved one.
void check_first_row(const Tensor& rng_state, int64_t batch);
// Fails unless each of the int64 numbers is one of `size` rows and none stands twice.
void check_distinct_rows(const char* name, const Tensor& rows, int64_t size);
// The same of int32 slots, of which several may be -1.
void check_distinct_slots(const Tensor& slot, int64_t branch_rows);

// Does what the parameters say, on the device with this index.
void run(ForwardParams params, int32_t device);
void run(BackwardParams params, int32_t device);
void run(const GateSumParams& params, int32_t device);
void run(const ClearParams& params, int32_t device);
void run(GatherParams params, int32_t device);
void run(const ScatterAddParams& params, int32_t device);
void run(const DifferenceParams& params, int32_t device);
void run(const InverseParams& params, int32_t device);
void run(const FactorRowsParams& params, int32_t device);
void run(const DrawParams& params, int32_t device);

// A step works in `step_scratch` numbers of scratch, null where that is none.
void run(const StepParams& params, float* scratch, int32_t device);
int64_t step_scratch(int64_t sections);

}  // namespace layerprune
