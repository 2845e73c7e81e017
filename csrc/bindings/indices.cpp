#include "indices.h"

#include "device.h"

namespace layerprune {

void check_rows_like(const char* name, const Tensor& rows, const Tensor& like) {
  check(rows.scalar_type() == like.scalar_type() && rows.dim() == like.dim(), name, " (",
        described(rows), ") must have the dtype and the dimensions of ", described(like));
  for (int64_t d = 1; d < like.dim(); ++d) {
    check(rows.size(d) == like.size(d), name, " (", described(rows),
          ") does not have rows like those of ", described(like));
  }
  check_device(name, rows, like);
}

Tensor inverse(const Tensor& index, int64_t size) {
  const Tensor result = torch::stable::new_empty(index, {size}, ScalarType::Long);
  const bool narrow = index.scalar_type() == ScalarType::Int;
  InverseParams p{};
  p.narrow = narrow ? read<int32_t>(index) : nullptr;
  p.wide = narrow ? nullptr : read<int64_t>(index);
  p.count = index.numel();
  p.size = size;
  p.inverse = write<int64_t>(result);
  run(p, index.get_device_index());
  return result;
}

void check_slots(const std::optional<Tensor>& slot, int64_t batch, int64_t branch_rows) {
  check(slot.has_value() || branch_rows == batch, "without slot the branch must have ", batch,
        " rows, not ", branch_rows);
  if (slot) check_distinct_slots(*slot, branch_rows);
}

std::optional<Tensor> owners(const std::optional<Tensor>& slot, int64_t branch_rows) {
  if (!slot) return std::nullopt;
  return inverse(*slot, branch_rows);
}

}  // namespace layerprune
