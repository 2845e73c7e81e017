"""The operations of gated residual layers, as operators of the ``layerprune`` library.

Each has an eager reference that serves every device, a fake implementation and autograd.
"""

from layerprune.ops.draw import GateDraw, sample_gates
from layerprune.ops.functional import gated_residual, sampled_gated_residual, take_rows
from layerprune.ops.philox import philox_4x32_10
from layerprune.ops.projected_step import projected_gate_step_

__all__ = [
    "GateDraw",
    "gated_residual",
    "philox_4x32_10",
    "projected_gate_step_",
    "sample_gates",
    "sampled_gated_residual",
    "take_rows",
]
