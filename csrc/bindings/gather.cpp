// The gather in front of a branch, its gradient, and what backward keeps of the branch.
#include "device.h"
#include "indices.h"
#include "operators.h"
#include "rows.h"

namespace layerprune {
namespace {

using torch::headeronly::MemoryFormat;

// out_p = x[row_p], zeros where row_p is -1.
Tensor gathered(const Tensor& x, const Tensor& rows) {
  const MemoryFormat format = row_format(x);
  const Tensor source = with_dense_rows(x, format);
  const Tensor out = empty_rows(rows.numel(), x, x.scalar_type(), format);
  GatherParams p{};
  p.element_bytes = static_cast<int64_t>(x.element_size());
  p.rows = rows.numel();
  p.size = row_size(x);
  p.source = rows_in(source);
  p.out = rows_out(out);
  p.row = read<int64_t>(rows);
  run(p, x.get_device_index());
  return out;
}

}  // namespace

Tensor gather_rows(const Tensor& x, const Tensor& rows) {
  check(x.dim() > 0, "x must have at least one dimension");
  const Tensor chosen = checked("rows", rows, x, ScalarType::Long, {rows.numel()});
  check_distinct_rows("rows", chosen, x.size(0));
  return gathered(x, chosen);
}

void scatter_add_rows_(Tensor out, const Tensor& rows, const Tensor& source) {
  check(out.dim() > 0, "out must have at least one dimension");
  check_rows_like("source", source, out);
  const int64_t count = rows.numel();
  const Tensor chosen = checked("rows", rows, out, ScalarType::Long, {count});
  check_distinct_rows("rows", chosen, out.size(0));
  check(source.size(0) == count, "source has ", source.size(0), " rows for ", count);
  const MemoryFormat format = row_format(out);
  check(is_dense(out, format), "out must be contiguous or channels_last");
  check_apart({"out", out}, {"source", source});
  const Tensor added = with_dense_rows(source, format);
  ScatterAddParams p{};
  p.type = element_type(out);
  p.rows = count;
  p.size = row_size(out);
  p.source = rows_in(added);
  p.out = rows_out(out);
  p.row = read<int64_t>(chosen);
  run(p, out.get_device_index());
}

// What a gate multiplies, for the rows whose gate gets a gradient; see reference.gate_factor.
Tensor gate_factor(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& slot,
                   const std::optional<Tensor>& gate_grad_rows, bool lerp) {
  check(x.dim() > 0, "x must have at least one dimension");
  check_rows_like("branch", branch, x);
  const int64_t batch = x.size(0), branch_rows = branch.size(0);
  const int64_t count = gate_grad_rows ? gate_grad_rows->numel() : branch_rows;
  const auto slots = checked("slot", slot, x, ScalarType::Int, {batch});
  const auto asked = checked("gate_grad_rows", gate_grad_rows, x, ScalarType::Long, {count});
  check_slots(slots, batch, branch_rows);
  if (asked) check_distinct_rows("gate_grad_rows", *asked, batch);
  const auto owner = asked ? std::nullopt : owners(slots, branch_rows);
  const Tensor branch_row = torch::stable::new_empty(x, {count}, ScalarType::Long);
  const Tensor x_row = torch::stable::new_empty(x, {count}, ScalarType::Long);
  FactorRowsParams chosen{};
  chosen.asked = read<int64_t>(asked);
  chosen.slot = read<int32_t>(slots);
  chosen.owner = read<int64_t>(owner);
  chosen.count = count;
  chosen.batch = batch;
  chosen.branch_rows = branch_rows;
  chosen.branch_row = write<int64_t>(branch_row);
  chosen.x_row = write<int64_t>(x_row);
  run(chosen, x.get_device_index());
  if (!lerp) return gathered(branch, branch_row);

  const MemoryFormat format = row_format(x);
  const Tensor minuend = with_dense_rows(branch, format), subtrahend = with_dense_rows(x, format);
  const Tensor out = empty_rows(count, x, accumulation_type(x), format);
  DifferenceParams p{};
  p.type = element_type(x);
  p.rows = count;
  p.size = row_size(x);
  p.branch = rows_in(minuend);
  p.x = rows_in(subtrahend);
  p.out = rows_out(out);
  p.branch_row = read<int64_t>(branch_row);
  p.x_row = read<int64_t>(x_row);
  run(p, x.get_device_index());
  return out;
}

}  // namespace layerprune
