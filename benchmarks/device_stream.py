"""What the cases on a GPU are made of: shapes, computations, and the tensors that cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from operation_cases import PROBED, linear_subset_sum, linear_sum, plain_sum, subset_sum
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Of a section's stream, and what its network does there."""

    size: tuple[int, ...]
    layout: torch.memory_format
    activation: str | None


# Batches so large that no tensor fits into the 50 MB of an H100's second-level cache: 411, 134 and
# 155 MB in 16 bit.
SHAPES = {
    "ResNet-50": Shape((256, 256, 56, 56), torch.channels_last, "relu"),
    "ResNet-56": Shape((4096, 16, 32, 32), torch.contiguous_format, "relu"),
    "ViT-B": Shape((512, 197, 768), torch.contiguous_format, None),
}
ALL = slice(None)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Computation:
    """A forward, and the gradients that its backward is asked for.

    Attributes:
        forward: The result, with its graph.
        inputs: What gets a gradient, by name.
        agreeing: Which rows of the result ("y") or of a gradient agree with which rows of the
            operation's own; all with all where there is no entry.
    """

    forward: Callable[[], Tensor]
    inputs: dict[str, Tensor]
    agreeing: dict[str, tuple[Tensor | slice, Tensor | slice]] = field(default_factory=dict)

    def gradients(self, y: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, tuple(self.inputs.values()), grad, retain_graph=True)

    def both(self, grad: Tensor) -> tuple[Tensor, ...]:
        return self.gradients(self.forward(), grad)

    def results(self, grad: Tensor) -> dict[str, Tensor]:
        y = self.forward()
        return {"y": y.detach(), **dict(zip(self.inputs, self.gradients(y, grad), strict=True))}


@dataclass(frozen=True)
class DeviceCase:
    """One operation on one kind of input.

    Attributes:
        name: The operation.
        labels: Shape, dtype and share of running rows.
        grad: Gradient of the result.
        ours: The operation.
        baselines: The same by other means.
        moved: Bytes that the operation has to move, forward and backward: each tensor of it read
            or written once.
        tolerance: Of the comparison of results, see `operation_cases.mean_error`.
    """

    name: str
    labels: dict
    grad: Tensor
    ours: Computation
    baselines: dict[str, Computation]
    moved: dict[str, int]
    tolerance: float


class Stream:
    """The tensors and the functions that the cases of one shape and dtype share.

    Args:
        name: Of the shape.
        shape: The shape.
        dtype: Of the activations.
        device: Where they lie.
        compiling: Whether torch.compile is among the baselines.
    """

    def __init__(
        self, name: str, shape: Shape, dtype: torch.dtype, device: str, compiling: bool
    ) -> None:
        # Another shape or dtype is no recompilation that would count towards the limit of them.
        torch._dynamo.reset()
        generator = torch.Generator(device).manual_seed(0)
        self.x, self.branch, self.grad = (
            torch.randn(shape.size, generator=generator, device=device)
            .to(dtype)
            .contiguous(memory_format=shape.layout)
            for _ in range(3)
        )
        # As in a network: no leaf, whose gradient would have to be a tensor of its own.
        self.x = self.x.requires_grad_().clone()
        self.name, self.shape, self.dtype = name, shape, dtype
        self.batch = shape.size[0]
        self.column = (-1,) + (1,) * (len(shape.size) - 1)
        self.row_bytes = self.x[0].numel() * self.x.element_size()
        self.mask_bytes = self.x.numel() // 8 if shape.activation else 0
        dense = plain_sum if shape.activation else linear_sum
        subset = subset_sum if shape.activation else linear_subset_sum
        self.dense, self.subset = {"eager": dense}, {"eager": subset}
        if compiling:
            self.dense["compile"] = _compiled(dense)
            self.subset["compile"] = _compiled(subset)
            if dtype == torch.bfloat16:
                # In one precision and for the sum alone, for it takes long. Without CUDA graphs,
                # which would copy the activations into memory of their own before every call.
                self.dense["max-autotune"] = _compiled(dense, "max-autotune-no-cudagraphs")

    def case(self, name: str, share: float, **parts: object) -> DeviceCase:
        labels = {
            "shape": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "share": share,
        }
        return DeviceCase(name, labels, self.grad, tolerance=TOLERANCE[self.dtype], **parts)


class Draw:
    """Which rows of a stream run and which are probed, and their gates: 1, or less for a probe."""

    def __init__(self, stream: Stream, share: float) -> None:
        generator = torch.Generator().manual_seed(2)
        device, batch = stream.x.device, stream.batch
        count = max(1, round(share * batch))
        probed = max(1, round(PROBED * count))
        rows = torch.randperm(batch, generator=generator)[:count].sort().values
        probes = rows[:: count // probed][:probed]
        slot = torch.full((batch,), -1, dtype=torch.int32)
        slot[rows] = torch.arange(count, dtype=torch.int32)
        gate = (slot >= 0).float()
        gate[probes] = torch.rand(probed, generator=generator)
        plain = torch.ones(batch, dtype=torch.bool)
        plain[probes] = False
        self.rows, self.slot, self.gate = rows.to(device), slot.to(device), gate.to(device)
        self.probes, self.plain = probes.to(device), plain.nonzero().squeeze(1).to(device)
        self.plain_slots = slot[rows[plain[rows]]].long().to(device)
        self.count, self.probed = count, probed


def _compiled(function: Callable, mode: str | None = None) -> Callable:
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)
