// Tensors as rows in memory order: which format results take, and how arguments are brought to it.
#pragma once

#include "../parameters.h"
#include "checks.h"

namespace layerprune {

// As layerprune.ops.reference.row_format: that of a contiguous or channels_last tensor, else
// contiguous.
torch::headeronly::MemoryFormat row_format(const Tensor& tensor);

// The format of a tensor of so many dimensions whose channels lie last, or do not.
torch::headeronly::MemoryFormat memory_format(int64_t dim, bool channels_last);

// Whether the whole tensor lies densely in memory in this format.
bool is_dense(const Tensor& tensor, torch::headeronly::MemoryFormat format);

// The tensor where every row of it is dense in this format, else a copy. Its first dimension may
// have any stride.
Tensor with_dense_rows(const Tensor& tensor, torch::headeronly::MemoryFormat format);

// Uninitialised, [count, *S] for `like` of [B, *S].
Tensor empty_rows(int64_t count, const Tensor& like, ScalarType type,
                  torch::headeronly::MemoryFormat format);

int64_t row_size(const Tensor& tensor);
int64_t bytes(const Tensor& tensor);

RowsIn rows_in(const Tensor& tensor);
RowsOut rows_out(const Tensor& tensor);

ElementType element_type(const Tensor& tensor);

// float64 for float64, else float32.
ScalarType accumulation_type(const Tensor& tensor);

}  // namespace layerprune
