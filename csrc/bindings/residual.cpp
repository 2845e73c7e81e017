// Operations 2 and 3, the gated residual sum and its backward.
#include "device.h"
#include "indices.h"
#include "operators.h"
#include "rows.h"

namespace layerprune {
namespace {

using torch::headeronly::MemoryFormat;

SumForm sum_form(bool relu, bool lerp) {
  check(!(relu && lerp), "lerp takes no activation");
  return lerp ? SumForm::kLerp : relu ? SumForm::kAddRelu : SumForm::kAdd;
}

// Where the gates come from: a tensor of them, or what they are drawn from.
struct Gates {
  const float* given;
  SampledGates sampled;
};

Gates given(const Tensor& gate) { return {read<float>(gate), {}}; }

// What gates are drawn from, as it must be for so many rows on the device of `like`.
class Sampling {
 public:
  Sampling(const Tensor& theta, const Tensor& rng_state, int64_t section, const Tensor& rows)
      : theta_(checked("theta", theta, rows, ScalarType::Float, {})),
        state_(checked("rng_state", rng_state, rows, ScalarType::Long, {3})),
        section_(static_cast<uint32_t>(section)) {
    check_probabilities("theta", theta_);
    check_first_row(state_, rows.size(0));
  }

  Gates gates(float* drawn) const {
    return {nullptr, {read<int64_t>(state_), section_, read<float>(theta_), drawn}};
  }

 private:
  Tensor theta_;
  Tensor state_;
  uint32_t section_;
};

// `mask` as in ForwardParams.
Tensor forward(const Tensor& x, const Tensor& branch, const Gates& gates,
               const std::optional<Tensor>& slot, SumForm form, uint8_t* mask = nullptr) {
  check_rows_like("branch", branch, x);
  check_slots(slot, x.size(0), branch.size(0));
  const MemoryFormat format = row_format(x);
  const Tensor input = with_dense_rows(x, format), other = with_dense_rows(branch, format);
  const Tensor y = empty_rows(x.size(0), x, x.scalar_type(), format);
  ForwardParams p{};
  p.type = element_type(x);
  p.form = form;
  p.rows = x.size(0);
  p.size = row_size(x);
  p.x = rows_in(input);
  p.branch = rows_in(other);
  p.y = rows_out(y);
  p.gate = gates.given;
  p.sampled = gates.sampled;
  p.slot = read<int32_t>(slot);
  p.mask = mask;
  run(p, x.get_device_index());
  return y;
}

// The gates' gradient: what the backward's parameters point to meanwhile, and the sum in the end.
class GateGradient {
 public:
  // `factor` as from gate_factor, for the rows `asked` or as the branch lies.
  GateGradient(const Tensor& factor, const std::optional<Tensor>& asked, int64_t branch_rows,
               const Tensor& grad, MemoryFormat format, BackwardParams& p)
      : factor_(checked_factor(factor, grad, format, p.form == SumForm::kLerp)),
        parts_(segments(p.size)),
        sums_(torch::stable::new_empty(grad, {p.rows, parts_}, ScalarType::Double)) {
    const int64_t count = asked ? asked->numel() : branch_rows;
    check(factor.size(0) == count, "factor has ", factor.size(0), " rows, but the gates' gradient",
          " is asked for ", count);
    if (asked) {
      check_distinct_rows("gate_grad_rows", *asked, p.rows);
      factor_row_ = inverse(*asked, p.rows);
    }
    p.factor = rows_in(factor_);
    p.factor_row = read<int64_t>(factor_row_);
    p.gate_sums = write<double>(sums_);
  }

  void write_to(const Tensor& d_gate) const {
    GateSumParams p{};
    p.rows = d_gate.numel();
    p.parts = parts_;
    p.gate_sums = read<double>(sums_);
    p.d_gate = write<float>(d_gate);
    run(p, d_gate.get_device_index());
  }

 private:
  static Tensor checked_factor(const Tensor& factor, const Tensor& grad, MemoryFormat format,
                               bool lerp) {
    const ScalarType type = lerp ? accumulation_type(grad) : grad.scalar_type();
    bool same = factor.scalar_type() == type && factor.dim() == grad.dim();
    for (int64_t d = 1; d < grad.dim(); ++d) same = same && factor.size(d) == grad.size(d);
    check(same, "factor (", described(factor), ") does not fit the gradient (", described(grad),
          lerp ? "), with lerp in the accumulation dtype" : ")");
    check_device("factor", factor, grad);
    return with_dense_rows(factor, format);
  }

  Tensor factor_;
  int64_t parts_;
  Tensor sums_;
  std::optional<Tensor> factor_row_;
};

struct Gradients {
  Tensor d_x;
  Tensor d_branch;
  std::optional<Tensor> d_gate;  // where there is a factor
};

// What backward knows of the forward's result: it, or the mask, where there was a ReLU; its format.
struct Result {
  std::optional<Tensor> y;
  std::optional<Tensor> mask;
  MemoryFormat format;
};

Result result_of(const std::optional<Tensor>& y, const Tensor& grad) {
  if (!y) return {std::nullopt, std::nullopt, row_format(grad)};
  check_rows_like("y", *y, grad);
  check(y->size(0) == grad.size(0), "y has ", y->size(0), " rows for ", grad.size(0),
        " of the gradient");
  const MemoryFormat format = row_format(*y);
  return {with_dense_rows(*y, format), std::nullopt, format};
}

Gradients backward(const Tensor& grad, const Result& result, const Gates& gates,
                   const std::optional<Tensor>& slot, const std::optional<Tensor>& factor,
                   const std::optional<Tensor>& gate_grad_rows, int64_t branch_rows, bool lerp,
                   bool wants_x) {
  const int64_t batch = grad.size(0);
  check(branch_rows >= 0, "branch_rows is ", branch_rows);
  check_slots(slot, batch, branch_rows);
  const int32_t device = grad.get_device_index();
  const MemoryFormat format = result.format;
  const Tensor incoming = with_dense_rows(grad, format);
  const Tensor d_x = empty_rows(wants_x ? batch : 0, grad, grad.scalar_type(), format);
  const Tensor d_branch = empty_rows(branch_rows, grad, grad.scalar_type(), format);

  BackwardParams p{};
  p.type = element_type(grad);
  p.form = sum_form(result.y || result.mask, lerp);
  p.rows = batch;
  p.size = row_size(grad);
  p.grad = rows_in(incoming);
  if (result.y) p.y = rows_in(*result.y);
  p.mask = read<uint8_t>(result.mask);
  if (wants_x) p.d_x = rows_out(d_x);
  p.d_branch = rows_out(d_branch);
  p.gate = gates.given;
  p.sampled = gates.sampled;
  p.slot = read<int32_t>(slot);
  std::optional<GateGradient> gate_gradient;
  if (factor) gate_gradient.emplace(*factor, gate_grad_rows, branch_rows, grad, format, p);
  run(p, device);

  if (const auto owner = owners(slot, branch_rows)) {
    ClearParams unread{};
    unread.row_bytes = p.size * static_cast<int64_t>(grad.element_size());
    unread.out = p.d_branch;
    unread.owner = read<int64_t>(owner);
    run(unread, device);
  }
  if (!gate_gradient) return {d_x, d_branch, std::nullopt};
  const Tensor d_gate = torch::stable::new_empty(grad, {batch}, ScalarType::Float);
  gate_gradient->write_to(d_gate);
  return {d_x, d_branch, d_gate};
}

// With zeros where no gate's gradient was asked for.
std::tuple<Tensor, Tensor, Tensor> with_gate_gradient(const Gradients& found, const Tensor& gates) {
  return {found.d_x, found.d_branch,
          found.d_gate ? *found.d_gate : torch::stable::new_zeros(gates, {gates.numel()})};
}

// A list of rows of any length.
std::optional<Tensor> checked_rows(const char* name, const std::optional<Tensor>& rows,
                                   const Tensor& like) {
  if (!rows) return std::nullopt;
  return checked(name, *rows, like, ScalarType::Long, {rows->numel()});
}

}  // namespace

Tensor gated_residual(const Tensor& x, const Tensor& branch, const Tensor& gate,
                      const std::optional<Tensor>& slot, const std::optional<Tensor>&, bool relu,
                      bool lerp) {
  check(x.dim() > 0, "x must have at least one dimension");
  const int64_t batch = x.size(0);
  const Tensor gates = checked("gate", gate, x, ScalarType::Float, {batch});
  const auto slots = checked("slot", slot, x, ScalarType::Int, {batch});
  return forward(x, branch, given(gates), slots, sum_form(relu, lerp));
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    const Tensor& grad, const std::optional<Tensor>& y, const Tensor& gate,
    const std::optional<Tensor>& slot, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& gate_grad_rows, int64_t branch_rows, bool lerp, bool wants_x) {
  check(grad.dim() > 0, "grad must have at least one dimension");
  const int64_t batch = grad.size(0);
  const Tensor gates = checked("gate", gate, grad, ScalarType::Float, {batch});
  const auto slots = checked("slot", slot, grad, ScalarType::Int, {batch});
  const auto asked = checked_rows("gate_grad_rows", gate_grad_rows, grad);
  return with_gate_gradient(backward(grad, result_of(y, grad), given(gates), slots, factor, asked,
                                     branch_rows, lerp, wants_x),
                            gates);
}

std::tuple<Tensor, Tensor> gated_relu(const Tensor& x, const Tensor& branch, const Tensor& gate,
                                      const std::optional<Tensor>& slot,
                                      const std::optional<Tensor>&) {
  check(x.dim() > 0, "x must have at least one dimension");
  const int64_t batch = x.size(0);
  const Tensor gates = checked("gate", gate, x, ScalarType::Float, {batch});
  const auto slots = checked("slot", slot, x, ScalarType::Int, {batch});
  const Tensor mask =
      torch::stable::new_empty(x, {batch, mask_bytes(row_size(x))}, ScalarType::Byte);
  return {forward(x, branch, given(gates), slots, SumForm::kAddRelu, write<uint8_t>(mask)), mask};
}

std::tuple<Tensor, Tensor, Tensor> gated_relu_backward(const Tensor& grad, const Tensor& mask,
                                                       bool channels_last, const Tensor& gate,
                                                       const std::optional<Tensor>& slot,
                                                       const std::optional<Tensor>& factor,
                                                       const std::optional<Tensor>& gate_grad_rows,
                                                       int64_t branch_rows) {
  check(grad.dim() > 0, "grad must have at least one dimension");
  const int64_t batch = grad.size(0);
  const Tensor bits =
      checked("mask", mask, grad, ScalarType::Byte, {batch, mask_bytes(row_size(grad))});
  const Tensor gates = checked("gate", gate, grad, ScalarType::Float, {batch});
  const auto slots = checked("slot", slot, grad, ScalarType::Int, {batch});
  const auto asked = checked_rows("gate_grad_rows", gate_grad_rows, grad);
  const Result result{std::nullopt, bits, memory_format(grad.dim(), channels_last)};
  return with_gate_gradient(
      backward(grad, result, given(gates), slots, factor, asked, branch_rows, false, true), gates);
}

std::tuple<Tensor, Tensor> sampled_gated_residual(const Tensor& x, const Tensor& branch,
                                                  const Tensor& theta, const Tensor& rng_state,
                                                  int64_t section, bool relu, bool lerp) {
  check(x.dim() > 0, "x must have at least one dimension");
  const Sampling sampling(theta, rng_state, section, x);
  const Tensor gates = torch::stable::new_empty(theta, {x.size(0)});
  const Gates drawn = sampling.gates(write<float>(gates));
  return {forward(x, branch, drawn, std::nullopt, sum_form(relu, lerp)), gates};
}

std::tuple<Tensor, Tensor> sampled_gated_residual_backward(const Tensor& grad,
                                                           const std::optional<Tensor>& y,
                                                           const Tensor& theta,
                                                           const Tensor& rng_state, int64_t section,
                                                           bool lerp, bool wants_x) {
  check(grad.dim() > 0, "grad must have at least one dimension");
  const Sampling sampling(theta, rng_state, section, grad);
  Gradients found = backward(grad, result_of(y, grad), sampling.gates(nullptr), std::nullopt,
                             std::nullopt, std::nullopt, grad.size(0), lerp, wants_x);
  return {found.d_x, found.d_branch};
}

}  // namespace layerprune
