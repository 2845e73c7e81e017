"""The operations of gated residual layers, as operators of the ``layerprune`` library.

Each has an eager reference that serves every device, a compiled kernel for the CPU where the
compiled part is installed (`backends` says), a fake implementation and autograd.
"""

from layerprune.ops.backends import Backend, backends
from layerprune.ops.draw import GateDraw, sample_gates
from layerprune.ops.functional import gated_residual, sampled_gated_residual, take_rows
from layerprune.ops.philox import philox_4x32_10, philox_stream
from layerprune.ops.projected_step import projected_gate_step_
from layerprune.ops.triton_backend import install

install()

__all__ = [
    "Backend",
    "GateDraw",
    "backends",
    "gated_residual",
    "philox_4x32_10",
    "philox_stream",
    "projected_gate_step_",
    "sample_gates",
    "sampled_gated_residual",
    "take_rows",
]
