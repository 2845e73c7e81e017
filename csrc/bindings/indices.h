// Slots and lists of rows.
#pragma once

#include "checks.h"

namespace layerprune {

// Fails unless `rows` has the device, the dtype and, but for their number, the rows of `like`.
void check_rows_like(const char* name, const Tensor& rows, const Tensor& like);

// int64 [size]: the place of a number in `index`, int32 or int64, or -1.
Tensor inverse(const Tensor& index, int64_t size);

// Fails unless every slot, an int32 tensor's, is -1 or one of the rows of the branch, none twice;
// without slots the rows must correspond.
void check_slots(const std::optional<Tensor>& slot, int64_t batch, int64_t branch_rows);

// For each row of the branch the row that reads it, or -1. None where the rows correspond.
std::optional<Tensor> owners(const std::optional<Tensor>& slot, int64_t branch_rows);

}  // namespace layerprune
