// The operators, for any device, and their registration for one. Schemas are in layerprune/ops/.
#pragma once

#include <tuple>

#include "checks.h"

namespace layerprune {

Tensor gated_residual(const Tensor& x, const Tensor& branch, const Tensor& gate,
                      const std::optional<Tensor>& slot,
                      const std::optional<Tensor>& gate_grad_rows, bool relu, bool lerp);

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    const Tensor& grad, const std::optional<Tensor>& y, const Tensor& gate,
    const std::optional<Tensor>& slot, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& gate_grad_rows, int64_t branch_rows, bool lerp, bool wants_x);

std::tuple<Tensor, Tensor> sampled_gated_residual(const Tensor& x, const Tensor& branch,
                                                  const Tensor& theta, const Tensor& rng_state,
                                                  int64_t section, bool relu, bool lerp);

std::tuple<Tensor, Tensor> sampled_gated_residual_backward(const Tensor& grad,
                                                           const std::optional<Tensor>& y,
                                                           const Tensor& theta,
                                                           const Tensor& rng_state, int64_t section,
                                                           bool lerp, bool wants_x);

Tensor gather_rows(const Tensor& x, const Tensor& rows);

void scatter_add_rows_(Tensor out, const Tensor& rows, const Tensor& source);

Tensor gate_factor(const Tensor& x, const Tensor& branch, const std::optional<Tensor>& slot,
                   const std::optional<Tensor>& gate_grad_rows, bool lerp);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_gates(
    const Tensor& theta, int64_t batch, const Tensor& rng_state, const Tensor& probe_rate,
    int64_t min_rows, int64_t row_multiple, const std::string& scheme);

void projected_gate_step_(Tensor theta, Tensor statistics, Tensor in_play, const Tensor& slope,
                          const Tensor& counted, const Tensor& penalty, const Tensor& free,
                          double horizon, double noise_factor, double decay, double confidence,
                          int64_t max_descending);

std::tuple<Tensor, Tensor> gated_relu(const Tensor& x, const Tensor& branch, const Tensor& gate,
                                      const std::optional<Tensor>& slot,
                                      const std::optional<Tensor>& gate_grad_rows);

std::tuple<Tensor, Tensor, Tensor> gated_relu_backward(const Tensor& grad, const Tensor& mask,
                                                       bool channels_last, const Tensor& gate,
                                                       const std::optional<Tensor>& slot,
                                                       const std::optional<Tensor>& factor,
                                                       const std::optional<Tensor>& gate_grad_rows,
                                                       int64_t branch_rows);

template <typename Library>
void register_operators(Library& m) {
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("sampled_gated_residual", TORCH_BOX(&sampled_gated_residual));
  m.impl("sampled_gated_residual_backward", TORCH_BOX(&sampled_gated_residual_backward));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
  m.impl("scatter_add_rows_", TORCH_BOX(&scatter_add_rows_));
  m.impl("gate_factor", TORCH_BOX(&gate_factor));
  m.impl("sample_gates", TORCH_BOX(&sample_gates));
  m.impl("projected_gate_step_", TORCH_BOX(&projected_gate_step_));
}

// Those with ReLU's mask, which the kernels of a GPU write and read; the CPU's keep the result.
template <typename Library>
void register_masked_operators(Library& m) {
  m.impl("gated_relu", TORCH_BOX(&gated_relu));
  m.impl("gated_relu_backward", TORCH_BOX(&gated_relu_backward));
}

}  // namespace layerprune
