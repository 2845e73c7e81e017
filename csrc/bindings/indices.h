// Checks of values that the kernels follow without looking: slots, lists of rows, probabilities.
#pragma once

#include <vector>

#include "checks.h"

namespace layerprune {

void check_probabilities(const char* name, const float* values, int64_t count);

// Fails unless the batch's global rows leave the reserved row free.
void check_first_row(int64_t first_row, int64_t batch);

// Fails unless `rows` has the dtype and, but for their number, the rows of `like`.
void check_rows_like(const char* name, const Tensor& rows, const Tensor& like);

// Fails unless each row is one of `batch` and none stands twice.
void check_distinct_rows(const char* name, const int64_t* rows, int64_t count, int64_t batch);

// For each row of the branch the row that reads it, or -1. Fails where a slot is no row of the
// branch or stands twice. Null for `slot`: the rows correspond.
std::vector<int64_t> owners(const int32_t* slot, int64_t batch, int64_t branch_rows);

}  // namespace layerprune
