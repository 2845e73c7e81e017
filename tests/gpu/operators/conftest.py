"""The operators of each family of GPU kernels, by whatever can run them here.

On a GPU these are the compiled CUDA kernels and Triton's, or those that LAYERPRUNE_BACKEND names.
Without one they are the CUDA kernels as `emulation` runs them on the host, or under
TRITON_INTERPRET=1 Triton's in its interpreter. The same tests hold for all; on a GPU,
compute-sanitizer can watch them.
"""

import os
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from layerprune import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    FAMILIES = ["interpreted"]
elif torch.cuda.is_available():
    wish = os.environ.get("LAYERPRUNE_BACKEND")
    FAMILIES = {"compiled": ["cuda"], "triton": ["triton"]}.get(wish, ["cuda", "triton"])
else:
    FAMILIES = ["emulated"]


@dataclass(frozen=True)
class Implementation:
    """What computes the operators: a function for each, and where its tensors are."""

    name: str
    device: str
    operators: Mapping[str, Callable[..., Any]]

    @property
    def slow(self) -> bool:
        """Whether one program takes milliseconds: then there are fewer cases."""
        return self.name == "interpreted"

    def place(self, value: Any) -> Any:
        """A tensor's whole memory on the device, and in it a view of the same strides."""
        if not isinstance(value, torch.Tensor):
            return value
        memory = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
        there = memory.to(self.device, copy=True)
        return there.as_strided(value.size(), value.stride(), value.storage_offset())

    def __call__(self, name: str, *arguments: Any) -> Any:
        """The operator's result, on the CPU."""
        result = self.operators[name](*map(self.place, arguments))
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(t.cpu() for t in result)

    def in_place(self, name: str, *arguments: Any) -> list[Any]:
        """The arguments as the operator leaves them, on the CPU."""
        placed = [self.place(argument) for argument in arguments]
        self.operators[name](*placed)
        return [p.cpu() if isinstance(p, torch.Tensor) else p for p in placed]


@cache
def emulation() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parent / "emulation" / "build.py"))


@pytest.fixture(scope="session")
def emulated() -> Any:
    """The library of the emulated kernels, by ctypes."""
    if INTERPRETED:
        pytest.skip("Triton's kernels are under test")
    if (reason := emulation()["obstacle"]()) is not None:
        pytest.skip(f"the emulation of the CUDA kernels {reason}")
    return emulation()["load"]()


def named(library: Any) -> dict[str, Callable[..., Any]]:
    names = (n.partition("::") for n in torch._C._dispatch_get_all_op_names())
    return {name: getattr(library, name) for space, _, name in names if space == "layerprune"}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return Implementation("emulated", "cpu", named(torch.ops.layerprune_emulated))
    if request.param == "cuda":
        if ops.backends()["cuda"].name != "compiled":
            pytest.skip(f"CUDA is served by {ops.backends()['cuda']}")
        return Implementation("cuda", "cuda", named(torch.ops.layerprune))
    kernels = pytest.importorskip("layerprune.kernels", reason="needs Triton, and an installation")
    return Implementation(
        request.param, "cpu" if request.param == "interpreted" else "cuda", kernels.OPERATORS
    )


@pytest.fixture
def implementation(family: Implementation, request: pytest.FixtureRequest) -> Implementation:
    """A family; memory that it does not write holds NaN, or the greatest integer."""
    if family.name == "emulated":
        request.getfixturevalue("emulated").set_order(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield family
    torch.use_deterministic_algorithms(False)


def close(found: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Asserts an error of at most twice that of the same formula in the same dtype, plus a little.

    The rule of FlashAttention's tests. ``eager`` is the specification's result, which fixes dtype
    and layout as well, and ``exact`` the same in float64.
    """
    assert found.dtype == eager.dtype and found.shape == eager.shape
    if found.numel() == 0:
        return
    assert found.stride() == eager.stride()
    # The formula itself may have been lucky, or is as exact as what it is compared with.
    room = 8 * torch.finfo(found.dtype).eps * exact.abs().max()
    bound = 2 * (eager.double() - exact).abs().max() + room
    error = (found.double() - exact).abs().max()
    assert error <= bound, f"error {error} above {bound}"


@pytest.fixture(scope="session", name="close")
def close_fixture() -> Callable[..., None]:
    return close
