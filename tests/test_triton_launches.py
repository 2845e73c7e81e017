"""What Triton makes of a launch's arguments compiles: a number that is 1 becomes a constant.

The interpreter knows nothing of that, and `test_triton_compiles` chooses the kernels' signatures
itself. Here the operators launch on tensors of the CPU through a driver that only compiles.
"""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or not (
    importlib.util.find_spec("triton") and importlib.util.find_spec("layerprune.kernels")
):
    pytest.skip("needs Triton's compiler and layerprune installed", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from layerprune.kernels import OPERATORS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Launches compile for an H100, the tuned ones in their first configuration."""
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_stream=lambda device: 0,
        get_device_capability=lambda *_: (9, 0),
        get_active_torch_device=lambda: torch.device("cpu"),
        get_benchmarker=lambda: None,
    )
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        return run(self, *arguments, grid=grid, warmup=True, **options)

    def compile_first(self, *arguments, grid, warmup=True, **options):
        options |= self.configs[0].all_kwargs()
        return self.fn.run(*arguments, grid=(1,), warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(Autotuner, "run", compile_first)
    monkeypatch.setattr(driver, "_active", device)


@pytest.mark.parametrize("size", [1, 2, 16, 5000])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_rows(batch, size):
    x, gate, mask = (
        torch.zeros(batch, size),
        torch.ones(batch),
        torch.zeros(batch, -(-size // 8), dtype=torch.uint8),
    )
    count = max(1, batch // 2)
    branch, slot = x[:count].clone(), torch.zeros(batch, dtype=torch.int32)
    asked, one = torch.zeros(1, dtype=torch.int64), branch[:1].clone()
    for lerp in (False, True):
        y = None if lerp else x
        OPERATORS["gated_residual"](x, x, gate, None, None, not lerp, lerp)
        OPERATORS["gated_residual"](x, branch, gate, slot, None, False, lerp)
        OPERATORS["gated_residual_backward"](x, y, gate, None, x, None, batch, lerp)
        OPERATORS["gated_residual_backward"](x, y, gate, slot, one, asked, count, lerp)
        OPERATORS["gated_residual_backward"](x, y, gate, slot, None, None, count, lerp)
        OPERATORS["gate_factor"](x, branch, slot, asked, lerp)
        OPERATORS["gate_factor"](x, branch, slot, None, lerp)
    OPERATORS["gated_residual_backward"](x, None, gate, None, x, None, batch, False, False)
    OPERATORS["gated_relu"](x, branch, gate, slot, None)
    OPERATORS["gated_relu_backward"](x, mask, False, gate, slot, one, asked, count)
    OPERATORS["gather_rows"](x, asked)
    OPERATORS["scatter_add_rows_"](x, asked, one)


@pytest.mark.parametrize("section", [0, 1, 2, 16, 2**31, 2**32 - 1])
def test_sections(section):
    x, theta, state = torch.zeros(2, 16), torch.tensor(0.5), torch.tensor([1, 2, 3])
    OPERATORS["sampled_gated_residual"](x, x, theta, state, section, True, False)
    OPERATORS["sampled_gated_residual_backward"](x, x, theta, state, section, False)


@pytest.mark.parametrize("scheme", ["systematic", "independent"])
@pytest.mark.parametrize("batch", [1, 2, 256])
def test_draw(batch, scheme):
    for sections in (1, 3):
        for least, multiple in ((0, 1), (1, 1), (2, 8)):
            OPERATORS["sample_gates"](
                torch.zeros(sections), batch, torch.tensor([1, 2, 3]), torch.zeros(sections),
                least, multiple, scheme,
            )  # fmt: skip


@pytest.mark.parametrize("numbers", [(1.0, 1.0, 1.0, 1.0), (10.0, 4.0, 0.9, 2.0), (1, 0, 1, 1)])
@pytest.mark.parametrize("max_descending", [-1, 1, 4])
def test_step(max_descending, numbers):
    for sections, rows in ((1, 1), (3, 0), (16, 256)):
        theta, flags = torch.zeros(sections), torch.zeros(sections, dtype=torch.bool)
        slope, counted = torch.zeros(sections, rows), torch.zeros(sections, rows, dtype=torch.bool)
        OPERATORS["projected_gate_step_"](
            theta, torch.zeros(5, sections), flags, slope, counted, torch.ones(sections), ~flags,
            *numbers, max_descending,
        )  # fmt: skip
