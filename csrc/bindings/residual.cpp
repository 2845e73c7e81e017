// Operations 2 and 3, the gated residual sum and its backward, for tensors on the CPU.
#include <cstring>
#include <tuple>
#include <vector>

#include "indices.h"
#include "rows.h"

namespace layerprune {
namespace {

using torch::headeronly::MemoryFormat;

SumForm sum_form(bool relu, bool lerp) {
  check(!(relu && lerp), "lerp takes no activation");
  return lerp ? SumForm::kLerp : relu ? SumForm::kAddRelu : SumForm::kAdd;
}

Tensor forward(const Tensor& x, const Tensor& branch, const float* gate, const int32_t* slot,
               SumForm form) {
  check_rows_like("branch", branch, x);
  owners(slot, x.size(0), branch.size(0));  // for its checks
  const MemoryFormat format = row_format(x);
  const Tensor input = with_dense_rows(x, format), other = with_dense_rows(branch, format);
  const Tensor y = empty_rows(x.size(0), x, x.scalar_type(), format);
  ForwardParams p{};
  p.type = element_type(x);
  p.form = form;
  p.non_temporal = non_temporal(bytes(x) + bytes(branch) + bytes(y), {&y});
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

// The gates' gradient: what the backward's parameters point to meanwhile, and the sum in the end.
class GateGradient {
 public:
  // `factor` as from gate_factor, for the rows `asked` or as the branch lies.
  GateGradient(const Tensor& factor, const std::optional<Tensor>& asked, int64_t branch_rows,
               const Tensor& grad, MemoryFormat format, BackwardParams& p)
      : factor_(checked_factor(factor, grad, format, p.form == SumForm::kLerp)),
        sums_(p.rows * segments(p.size)) {
    const int64_t count = asked ? asked->numel() : branch_rows;
    check(factor.size(0) == count, "factor has ", factor.size(0), " rows, but the gates' gradient",
          " is asked for ", count);
    if (asked) {
      const int64_t* rows = read<int64_t>(asked);
      check_distinct_rows("gate_grad_rows", rows, count, p.rows);
      factor_row_.assign(p.rows, -1);
      for (int64_t i = 0; i < count; ++i) {
        // A row without a slot has no branch: its gate's gradient is 0.
        if (p.slot == nullptr || p.slot[rows[i]] >= 0) factor_row_[rows[i]] = i;
      }
    } else if (p.slot != nullptr) {
      factor_row_.assign(p.slot, p.slot + p.rows);
    }
    p.factor = rows_in(factor_);
    p.factor_row = factor_row_.empty() ? nullptr : factor_row_.data();
    p.gate_sums = sums_.data();
  }

  void write_to(float* d_gate, int64_t rows) const {
    const int64_t parts = rows == 0 ? 0 : static_cast<int64_t>(sums_.size()) / rows;
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0.0;
      for (int64_t part = 0; part < parts; ++part) sum += sums_[row * parts + part];
      d_gate[row] = static_cast<float>(sum);
    }
  }

 private:
  static Tensor checked_factor(const Tensor& factor, const Tensor& grad, MemoryFormat format,
                               bool lerp) {
    const ScalarType type = lerp ? accumulation_type(grad) : grad.scalar_type();
    bool same = factor.scalar_type() == type && factor.dim() == grad.dim();
    for (int64_t d = 1; d < grad.dim(); ++d) same = same && factor.size(d) == grad.size(d);
    check(same, "factor (", described(factor), ") does not fit the gradient (", described(grad),
          lerp ? "), with lerp in the accumulation dtype" : ")");
    return with_dense_rows(factor, format);
  }

  Tensor factor_;
  std::vector<int64_t> factor_row_;
  std::vector<double> sums_;
};

struct Gradients {
  Tensor d_x;
  Tensor d_branch;
  Tensor d_gate;
};

Gradients backward(const Tensor& grad, const std::optional<Tensor>& y, const Tensor& gate,
                   const std::optional<Tensor>& slot, const std::optional<Tensor>& factor,
                   const std::optional<Tensor>& gate_grad_rows, int64_t branch_rows, bool lerp) {
  const int64_t batch = grad.size(0);
  if (y) {
    check_rows_like("y", *y, grad);
    check(y->size(0) == batch, "y has ", y->size(0), " rows for ", batch, " of the gradient");
  }
  check(branch_rows >= 0, "branch_rows is ", branch_rows);
  const std::vector<int64_t> owner = owners(read<int32_t>(slot), batch, branch_rows);
  const MemoryFormat format = row_format(y ? *y : grad);
  const Tensor incoming = with_dense_rows(grad, format);
  const Tensor output = y ? with_dense_rows(*y, format) : incoming;
  const Tensor d_x = empty_rows(batch, grad, grad.scalar_type(), format);
  const Tensor d_branch = empty_rows(branch_rows, grad, grad.scalar_type(), format);
  const Tensor d_gate = torch::stable::new_zeros(gate, {batch});

  BackwardParams p{};
  p.type = element_type(grad);
  p.form = sum_form(y.has_value(), lerp);
  p.non_temporal = non_temporal(bytes(grad) + bytes(d_x) + bytes(d_branch), {&d_x, &d_branch});
  p.rows = batch;
  p.size = row_size(grad);
  p.grad = rows_in(incoming);
  p.y = rows_in(output);
  p.d_x = rows_out(d_x);
  p.d_branch = rows_out(d_branch);
  p.gate = read<float>(gate);
  p.slot = read<int32_t>(slot);
  std::optional<GateGradient> gate_gradient;
  if (factor) gate_gradient.emplace(*factor, gate_grad_rows, branch_rows, grad, format, p);
  run(cpu_kernels().backward, p);

  if (gate_gradient) gate_gradient->write_to(write<float>(d_gate), batch);
  char* rows = write<char>(d_branch);
  const int64_t row_bytes = p.size * static_cast<int64_t>(grad.element_size());
  for (int64_t row = 0; row < branch_rows && row_bytes > 0; ++row) {
    if (owner[row] < 0) std::memset(rows + row * row_bytes, 0, row_bytes);  // nobody reads it
  }
  return {d_x, d_branch, d_gate};
}

// The gates of one section under the independent scheme without probes: float32 [batch].
Tensor independent_gates(const Tensor& theta, const Tensor& rng_state, int64_t section,
                         int64_t batch) {
  const float keep = *read<float>(checked("theta", theta, ScalarType::Float, {}));
  check_probabilities("theta", &keep, 1);
  const Tensor state = checked("rng_state", rng_state, ScalarType::Long, {3});
  const int64_t* values = read<int64_t>(state);
  check_first_row(values[2], batch);
  const Stream stream{static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[1])};
  const Tensor gates = torch::stable::new_empty(theta, {batch});
  std::vector<uint32_t> words(4 * batch);
  uint32_t* const each[4] = {words.data(), words.data() + batch, words.data() + 2 * batch,
                             words.data() + 3 * batch};
  cpu_kernels().row_words(stream, static_cast<uint32_t>(section), static_cast<uint32_t>(values[2]),
                          batch, each);
  float* result = write<float>(gates);
  for (int64_t row = 0; row < batch; ++row) result[row] = independent_gate(keep, each[3][row]);
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
  check(x.dim() > 0, "x must have at least one dimension");
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(layerprune, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("sampled_gated_residual", TORCH_BOX(&sampled_gated_residual));
  m.impl("sampled_gated_residual_backward", TORCH_BOX(&sampled_gated_residual_backward));
}

}  // namespace layerprune
