// The gather in front of a branch, its gradient, and what backward keeps of the branch, for tensors
// on the CPU.
#include <vector>

#include "indices.h"
#include "rows.h"

namespace layerprune {
namespace {

using torch::headeronly::MemoryFormat;

// out_p = x[row_p], zeros where row_p is -1.
Tensor gathered(const Tensor& x, const int64_t* rows, int64_t count) {
  const MemoryFormat format = row_format(x);
  const Tensor source = with_dense_rows(x, format);
  const Tensor out = empty_rows(count, x, x.scalar_type(), format);
  GatherParams p{};
  p.element_bytes = static_cast<int64_t>(x.element_size());
  p.non_temporal = non_temporal(2 * bytes(out), {&out});
  p.rows = count;
  p.size = row_size(x);
  p.source = rows_in(source);
  p.out = rows_out(out);
  p.row = rows;
  run(cpu_kernels().gather, p);
  return out;
}

Tensor gather_rows(const Tensor& x, const Tensor& rows) {
  check(x.dim() > 0, "x must have at least one dimension");
  const int64_t count = rows.numel();
  const Tensor chosen = checked("rows", rows, ScalarType::Long, {count});
  check_distinct_rows("rows", read<int64_t>(chosen), count, x.size(0));
  return gathered(x, read<int64_t>(chosen), count);
}

void scatter_add_rows_(Tensor out, const Tensor& rows, const Tensor& source) {
  check(out.dim() > 0, "out must have at least one dimension");
  check_rows_like("source", source, out);
  const int64_t count = rows.numel();
  const Tensor chosen = checked("rows", rows, ScalarType::Long, {count});
  check_distinct_rows("rows", read<int64_t>(chosen), count, out.size(0));
  check(source.size(0) == count, "source has ", source.size(0), " rows for ", count);
  const MemoryFormat format = row_format(out);
  check(is_dense(out, format), "out must be contiguous or channels_last");
  check_apart("out", out, "source", source);
  const Tensor added = with_dense_rows(source, format);
  ScatterAddParams p{};
  p.type = element_type(out);
  p.rows = count;
  p.size = row_size(out);
  p.source = rows_in(added);
  p.out = rows_out(out);
  p.row = read<int64_t>(chosen);
  run(cpu_kernels().scatter_add, p);
}

// What a gate multiplies, for the rows whose gate gets a gradient; see reference.gate_factor.
Tensor gate_factor(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& slot,
                   const std::optional<Tensor>& gate_grad_rows, bool lerp) {
  check(x.dim() > 0, "x must have at least one dimension");
  check_rows_like("branch", branch, x);
  const int64_t batch = x.size(0), branch_rows = branch.size(0);
  const auto slots = checked("slot", slot, ScalarType::Int, {batch});
  const int32_t* place = read<int32_t>(slots);
  const std::vector<int64_t> owner = owners(place, batch, branch_rows);
  std::vector<int64_t> x_rows, branch_row;
  if (gate_grad_rows) {
    const int64_t count = gate_grad_rows->numel();
    const Tensor asked = checked("gate_grad_rows", *gate_grad_rows, ScalarType::Long, {count});
    check_distinct_rows("gate_grad_rows", read<int64_t>(asked), count, batch);
    const int64_t* chosen = read<int64_t>(asked);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = chosen[i];
      branch_row.push_back(place == nullptr ? row : place[row]);
      x_rows.push_back(branch_row.back() < 0 ? -1 : row);
    }
  } else {
    x_rows = owner;
    for (int64_t row = 0; row < branch_rows; ++row) branch_row.push_back(owner[row] < 0 ? -1 : row);
  }
  const int64_t count = static_cast<int64_t>(x_rows.size());
  if (!lerp) return gathered(branch, branch_row.data(), count);

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
  p.branch_row = branch_row.data();
  p.x_row = x_rows.data();
  run(cpu_kernels().difference, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerprune, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("scatter_add_rows_", TORCH_BOX(&scatter_add_rows_));
  m.impl("gate_factor", TORCH_BOX(&gate_factor));
}

}  // namespace layerprune
