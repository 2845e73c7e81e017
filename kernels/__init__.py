"""Triton kernels of the operations, installed as ``layerprune.kernels``.

They serve CUDA devices where the compiled CUDA part does not, with the same draws bit for bit.
``OPERATORS`` has a function for every operator of the library, with its arguments. Importing this
package imports Triton.
"""

from __future__ import annotations

from layerprune.kernels import draw, residual, rows, step

OPERATORS = {
    function.__name__: function
    for function in (
        step.projected_gate_step_,
        draw.sample_gates,
        rows.gate_factor,
        residual.gated_residual,
        residual.gated_residual_backward,
        residual.gated_relu,
        residual.gated_relu_backward,
        rows.gather_rows,
        residual.sampled_gated_residual,
        residual.sampled_gated_residual_backward,
        rows.scatter_add_rows,
        rows.scatter_add_rows_,
    )
}
