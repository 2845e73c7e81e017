"""What a model costs: FLOPs per module, counted on fake tensors without computing anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

Inputs = Tensor | Sequence | Mapping


def as_call(inputs: Inputs) -> tuple[tuple, dict]:
    """Positional and keyword arguments from a tensor, a sequence or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (list, tuple)) else ((inputs,), {})


def batch_size_of(inputs: object) -> int:
    """First dimension of the first tensor among ``inputs``.

    Raises:
        ValueError: if there is no tensor with a dimension.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError("example_inputs, or what the model is called with, hold no tensor of a batch")


@contextmanager
def flags_kept(model: nn.Module):
    """Restores every module's own training flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def evaluating(model: nn.Module):
    """Puts every module into eval mode and restores each one's own flag afterwards."""
    with flags_kept(model):
        model.eval()
        yield


@contextmanager
def plain_attention():
    """Keeps torch's Transformer layers from their fused attention of evaluation mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def batch_tensors(inputs: object) -> list[Tensor]:
    """The tensors that may carry the batch: the first one, and all with as many rows."""
    rows = batch_size_of(inputs)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return [tensor for tensor in tensors if tensor.shape[0] == rows]


def dry_run(
    model: nn.Module,
    inputs: Inputs,
    batch_size: int | None = None,
    resized: Sequence[Tensor] | None = None,
) -> object:
    """The model's output as fake tensors, in eval mode: shapes without arithmetic.

    Not on the meta device: there, models that ask whether anybody exports them (transformers' do,
    before they look into a mask) are not told so.

    Args:
        model: left as it is.
        inputs: example inputs.
        batch_size: rows to pretend; ``None`` for as many as the example has.
        resized: the tensors of ``inputs`` that get this number of rows; ``None`` for all that may
            carry the batch.

    Returns:
        Whatever the model returns, with fake tensors.
    """
    chosen = set(map(id, batch_tensors(inputs) if resized is None else resized))

    def fake(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = list(leaf.shape)
        if batch_size is not None and id(leaf) in chosen:
            shape[0] = batch_size
        return torch.empty(shape, dtype=leaf.dtype, device="cpu")

    # One name for every tensor of every module: of two for the same, functional_call would put back
    # one that is a fake.
    tensors = {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }
    # torch's fused attention in evaluation mode makes nested tensors, which have no fake form; and
    # of attention's kernels, the flop counter knows only what the plain one is made of.
    with (
        torch.no_grad(),
        evaluating(model),
        plain_attention(),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        state = {name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}
        args, kwargs = as_call(tree_map(fake, inputs))
        return functional_call(model, state, args, kwargs, tie_weights=False)


def forward_flops(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Floating-point operations of one row's forward, by module name ("" is the whole model).

    Counted by `torch.utils.flop_counter` (a multiplication and an addition are two operations).
    """
    rows = batch_size_of(inputs)
    with FlopCounterMode(display=False) as counter:
        dry_run(model, inputs)
    root = type(model).__name__
    counts = {}
    for name, by_operation in counter.get_flop_counts().items():
        total = sum(by_operation.values()) / rows
        if name in ("Global", root):
            counts[""] = max(total, counts.get("", 0.0))
        elif name.startswith(f"{root}."):
            counts[name.removeprefix(f"{root}.")] = total
    return counts


def relative_costs(
    cost: str | Mapping[str, float],
    names: Sequence[str],
    params: Sequence[int],
    flops: Sequence[float],
) -> Tensor:
    """What each section costs, by the measure asked for.

    Args:
        cost: ``"flops"``, ``"params"``, ``"uniform"``, or a mapping from section name to cost, as
            `latency.section_latencies` measures it.
        names: the sections' names.
        params: parameters of each branch.
        flops: operations of each branch.

    Returns:
        float32 ``[L]``.

    Raises:
        ValueError: if ``cost`` is none of these, or lacks a section.
    """
    if isinstance(cost, Mapping):
        missing = [name for name in names if name not in cost]
        if missing:
            raise ValueError(f"cost gives no value for section {missing[0]!r}")
        return torch.tensor([float(cost[name]) for name in names], device="cpu")
    measures = {"flops": flops, "params": params, "uniform": [1.0] * len(names)}
    if not isinstance(cost, str) or cost not in measures:
        raise ValueError(
            'cost must be "flops", "params", "uniform", "latency" or a mapping by section name, '
            f"got {cost!r}"
        )
    return torch.tensor([float(value) for value in measures[cost]], device="cpu")
