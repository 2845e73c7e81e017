// Operations 2 and 3 and the gather in front of a branch, for tensors on the CPU.
#include <cstring>
#include <tuple>
#include <vector>

#include "rows.h"

namespace layerprune {
namespace {

using torch::headeronly::MemoryFormat;

SumForm sum_form(bool relu, bool lerp) {
  check(!(relu && lerp), "lerp takes no activation");
  return lerp ? SumForm::kLerp : relu ? SumForm::kAddRelu : SumForm::kAdd;
}

int64_t bytes(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

void check_rows(const char* name, const Tensor& rows, const Tensor& like) {
  check(rows.is_cpu() && rows.scalar_type() == like.scalar_type() && rows.dim() == like.dim() &&
            rows.dim() > 0,
        name, " of shape ", shape_of(rows), " must have the dtype, device and dimensions of ",
        shape_of(like));
  for (int64_t d = 1; d < like.dim(); ++d) {
    check(rows.size(d) == like.size(d), name, " of shape ", shape_of(rows),
          " does not have rows like those of ", shape_of(like));
  }
}

// For each row of the branch the row that reads it, or -1.
std::vector<int64_t> owners(const int32_t* slot, int64_t batch, int64_t branch_rows) {
  std::vector<int64_t> owner(branch_rows, -1);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t place = slot == nullptr ? row : slot[row];
    check(place >= -1 && place < branch_rows, "slot[", row, "] is ", place,
          ", but the branch has rows 0 to ", branch_rows - 1);
    if (place < 0) continue;
    check(owner[place] < 0, "slot has ", place, " twice, for rows ", owner[place], " and ", row);
    owner[place] = row;
  }
  return owner;
}

void check_distinct_rows(const char* name, const int64_t* rows, int64_t count, int64_t batch) {
  std::vector<bool> seen(batch);
  for (int64_t i = 0; i < count; ++i) {
    check(rows[i] >= 0 && rows[i] < batch, name, "[", i, "] is ", rows[i],
          ", but there are rows 0 to ", batch - 1);
    check(!seen[rows[i]], name, " has row ", rows[i], " twice");
    seen[rows[i]] = true;
  }
}

Tensor forward(const Tensor& x, const Tensor& branch, const float* gate, const int32_t* slot,
               SumForm form) {
  check_rows("branch", branch, x);
  const MemoryFormat format = row_format(x);
  const Tensor input = with_dense_rows(x, format), other = with_dense_rows(branch, format);
  const Tensor y = empty_rows(x.size(0), x, x.scalar_type(), format);
  ForwardParams p{};
  p.type = element_type(x);
  p.form = form;
  p.stream = streams(bytes(x) + bytes(branch) + bytes(y), {&y});
  p.rows = x.size(0);
  p.size = row_size(x);
  p.x = rows_in(input);
  p.branch = rows_in(other);
  p.y = rows_out(y);
  p.gate = gate;
  p.slot = slot;
  run(cpu_kernels().forward, p);
  return y;
}

struct Gradients {
  Tensor d_x;
  Tensor d_branch;
  Tensor d_gate;
};

Gradients backward(const Tensor& grad, const std::optional<Tensor>& y, const Tensor& gate,
                   const std::optional<Tensor>& slot, const std::optional<Tensor>& factor,
                   const std::optional<Tensor>& gate_grad_rows, int64_t branch_rows, bool lerp) {
  const int64_t batch = grad.size(0);
  check(branch_rows >= 0 && (slot || branch_rows == batch), "branch_rows is ", branch_rows, " for ",
        batch, " rows of the gradient");
  if (y) check_rows("y", *y, grad);
  const MemoryFormat format = row_format(y ? *y : grad);
  const Tensor incoming = with_dense_rows(grad, format);
  const std::optional<Tensor> output =
      y ? std::optional(with_dense_rows(*y, format)) : std::nullopt;
  const Tensor d_x = empty_rows(batch, grad, grad.scalar_type(), format);
  const Tensor d_branch = empty_rows(branch_rows, grad, grad.scalar_type(), format);
  const Tensor d_gate = torch::stable::new_zeros(gate, {batch});

  const int32_t* place = read<int32_t>(slot);
  const std::vector<int64_t> owner = owners(place, batch, branch_rows);

  BackwardParams p{};
  p.type = element_type(grad);
  p.form = sum_form(y.has_value(), lerp);
  p.rows = batch;
  p.size = row_size(grad);
  p.grad = rows_in(incoming);
  if (output) p.y = rows_in(*output);
  p.d_x = rows_out(d_x);
  p.d_branch = rows_out(d_branch);
  p.gate = read<float>(gate);
  p.slot = place;
  p.stream = streams(bytes(grad) + bytes(d_x) + bytes(d_branch), {&d_x, &d_branch});

  std::optional<Tensor> multiplied;
  std::vector<int32_t> factor_row;
  std::vector<double> gate_sums;
  if (factor) {
    const Tensor rows = with_dense_rows(*factor, format);
    check(rows.scalar_type() == (lerp ? accumulation_type(grad) : grad.scalar_type()) &&
              rows.dim() == grad.dim() && row_size(rows) == p.size,
          "factor of shape ", shape_of(rows), " has a wrong dtype or shape");
    multiplied = rows;
    p.factor = rows_in(rows);
    if (gate_grad_rows) {
      const int64_t count = gate_grad_rows->numel();
      const int64_t* asked = read<int64_t>(*gate_grad_rows);
      check_distinct_rows("gate_grad_rows", asked, count, batch);
      check(rows.size(0) == count, "factor has ", rows.size(0), " rows for ", count,
            " gate_grad_rows");
      factor_row.assign(batch, -1);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = asked[i];
        // A row without a slot has no branch: its gate's gradient is 0.
        if (place == nullptr || place[row] >= 0) factor_row[row] = static_cast<int32_t>(i);
      }
      p.factor_row = factor_row.data();
    } else {
      check(rows.size(0) == branch_rows, "factor has ", rows.size(0), " rows for ", branch_rows,
            " of the branch");
      p.factor_row = place;
    }
    gate_sums.resize(batch * segments(p.size));
    p.gate_sums = gate_sums.data();
  }
  run(cpu_kernels().backward, p);

  // Rows of the branch that nobody reads.
  const int64_t row_bytes = p.size * static_cast<int64_t>(grad.element_size());
  for (int64_t row = 0; row < branch_rows && row_bytes > 0; ++row) {
    if (owner[row] < 0) std::memset(write<char>(d_branch) + row * row_bytes, 0, row_bytes);
  }
  const int64_t per_row = segments(p.size);
  if (p.gate_sums != nullptr) {
    float* result = write<float>(d_gate);
    for (int64_t row = 0; row < batch; ++row) {
      double sum = 0.0;
      for (int64_t i = 0; i < per_row; ++i) sum += gate_sums[row * per_row + i];
      result[row] = static_cast<float>(sum);
    }
  }
  return {d_x, d_branch, d_gate};
}

// The gates of one section under the independent scheme without probes: float32 [batch].
Tensor independent_gates(const Tensor& theta, const Tensor& rng_state, int64_t section,
                         int64_t batch) {
  const float keep = *read<float>(checked("theta", theta, ScalarType::Float, {}));
  const Tensor state = checked("rng_state", rng_state, ScalarType::Long, {3});
  const int64_t* values = read<int64_t>(state);
  const Stream stream{static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[1])};
  const Tensor gates = torch::stable::new_empty(theta, {batch});
  std::vector<uint32_t> words(4 * batch);
  uint32_t* const each[4] = {words.data(), words.data() + batch, words.data() + 2 * batch,
                             words.data() + 3 * batch};
  cpu_kernels().row_words(stream, static_cast<uint32_t>(section), static_cast<uint32_t>(values[2]),
                          batch, each);
  for (int64_t row = 0; row < batch; ++row) {
    write<float>(gates)[row] = independent_gate(keep, each[3][row]);
  }
  return gates;
}

// ---- The operators ----

Tensor gated_residual(const Tensor& x, const Tensor& branch, const Tensor& gate,
                      const std::optional<Tensor>& slot, const std::optional<Tensor>&, bool relu,
                      bool lerp) {
  check(x.dim() > 0, "x must have at least one dimension");
  const int64_t batch = x.size(0);
  const Tensor gates = checked("gate", gate, ScalarType::Float, {batch});
  const auto slots = checked("slot", slot, ScalarType::Int, {batch});
  check(slot || branch.size(0) == batch, "without slot the branch must have ", batch, " rows");
  owners(read<int32_t>(slots), batch, branch.size(0));
  return forward(x, branch, read<float>(gates), read<int32_t>(slots), sum_form(relu, lerp));
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    const Tensor& grad, const std::optional<Tensor>& y, const Tensor& gate,
    const std::optional<Tensor>& slot, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& gate_grad_rows, int64_t branch_rows, bool lerp) {
  check(grad.dim() > 0, "grad must have at least one dimension");
  const int64_t batch = grad.size(0);
  const Tensor gates = checked("gate", gate, ScalarType::Float, {batch});
  const auto slots = checked("slot", slot, ScalarType::Int, {batch});
  const auto asked = gate_grad_rows ? checked("gate_grad_rows", gate_grad_rows, ScalarType::Long,
                                              {gate_grad_rows->numel()})
                                    : std::nullopt;
  Gradients found = backward(grad, y, gates, slots, factor, asked, branch_rows, lerp);
  return {found.d_x, found.d_branch, found.d_gate};
}

std::tuple<Tensor, Tensor> sampled_gated_residual(const Tensor& x, const Tensor& branch,
                                                  const Tensor& theta, const Tensor& rng_state,
                                                  int64_t section, bool relu, bool lerp) {
  check(x.dim() > 0 && branch.dim() > 0 && branch.size(0) == x.size(0),
        "x and branch must have one shape");
  const Tensor gates = independent_gates(theta, rng_state, section, x.size(0));
  return {forward(x, branch, read<float>(gates), nullptr, sum_form(relu, lerp)), gates};
}

std::tuple<Tensor, Tensor> sampled_gated_residual_backward(const Tensor& grad,
                                                           const std::optional<Tensor>& y,
                                                           const Tensor& theta,
                                                           const Tensor& rng_state, int64_t section,
                                                           bool lerp) {
  check(grad.dim() > 0, "grad must have at least one dimension");
  const int64_t batch = grad.size(0);
  const Tensor gates = independent_gates(theta, rng_state, section, batch);
  Gradients found = backward(grad, y, gates, std::nullopt, std::nullopt, std::nullopt, batch, lerp);
  return {found.d_x, found.d_branch};
}

// out_p = x[row_p], zeros where row_p is -1.
Tensor gathered(const Tensor& x, const int64_t* rows, int64_t count) {
  const MemoryFormat format = row_format(x);
  const Tensor source = with_dense_rows(x, format);
  const Tensor out = empty_rows(count, x, x.scalar_type(), format);
  GatherParams p{};
  p.element_bytes = static_cast<int64_t>(x.element_size());
  p.stream = streams(2 * bytes(out), {&out});
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
  check_rows("source", source, out);
  const int64_t count = rows.numel();
  const Tensor chosen = checked("rows", rows, ScalarType::Long, {count});
  check_distinct_rows("rows", read<int64_t>(chosen), count, out.size(0));
  check(source.size(0) == count, "source has ", source.size(0), " rows for ", count);
  const MemoryFormat format = row_format(out);
  check(with_dense_rows(out, format).const_data_ptr() == out.const_data_ptr(),
        "out must be contiguous or channels_last");
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
  check_rows("branch", branch, x);
  const int64_t batch = x.size(0), branch_rows = branch.size(0);
  const auto slots = checked("slot", slot, ScalarType::Int, {batch});
  check(slot || branch_rows == batch, "without slot the branch must have ", batch, " rows");
  const int32_t* place = read<int32_t>(slots);
  const std::vector<int64_t> owner = owners(place, batch, branch_rows);
  std::vector<int64_t> x_rows, branch_row;
  if (gate_grad_rows) {
    const int64_t count = gate_grad_rows->numel();
    const Tensor asked = checked("gate_grad_rows", *gate_grad_rows, ScalarType::Long, {count});
    check_distinct_rows("gate_grad_rows", read<int64_t>(asked), count, batch);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = read<int64_t>(asked)[i];
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
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("sampled_gated_residual", TORCH_BOX(&sampled_gated_residual));
  m.impl("sampled_gated_residual_backward", TORCH_BOX(&sampled_gated_residual_backward));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("scatter_add_rows_", TORCH_BOX(&scatter_add_rows_));
  m.impl("gate_factor", TORCH_BOX(&gate_factor));
}

}  // namespace layerprune
