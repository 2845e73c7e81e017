"""Forwards for the sake of their shapes, on fake tensors wherever that is possible."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from layerprune.calls import Inputs, as_call, batch_tensors, evaluating, plain_attention
from layerprune.side_forward import side_forward

FEW = 2
"""Rows of a dry run on real tensors: it computes."""


def dry_run(
    model: nn.Module,
    inputs: Inputs,
    batch_size: int | None = None,
    resized: Sequence[Tensor] | None = None,
    real: bool = False,
) -> object:
    """The model's output in eval mode, for its shapes.

    Of fake tensors, which have no values, unless asked for real ones: some models look at values,
    and some operations have no fake form. Not on the meta device: there, models that ask whether
    anybody exports them (transformers' do, before they look into a mask) are not told so.

    Args:
        model: left as it is.
        inputs: example inputs.
        batch_size: rows to run on; ``None`` for as many as the example has.
        resized: the tensors of ``inputs`` that get this number of rows; ``None`` for all that may
            carry the batch.
        real: whether to compute, on the model's device; the rows are the example's, repeated.

    Returns:
        Whatever the model returns.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    chosen = set(map(id, batch_tensors(inputs) if resized is None else resized))

    def sized(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        rows = batch_size if batch_size is not None and id(leaf) in chosen else None
        if real:
            leaf = leaf.to(device)
            return leaf if rows is None else leaf[torch.arange(rows) % leaf.shape[0]]
        shape = leaf.shape if rows is None else (rows, *leaf.shape[1:])
        return torch.empty(shape, dtype=leaf.dtype, device="cpu")

    # torch's fused attention in evaluation mode makes nested tensors, which have no fake form; and
    # of attention's kernels, the flop counter knows only what the plain one is made of.
    with evaluating(model), plain_attention(), sdpa_kernel(SDPBackend.MATH):
        if real:
            with side_forward(model):
                args, kwargs = as_call(tree_map(sized, inputs))
                return model(*args, **kwargs)
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            _without_reports(),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            args, kwargs = as_call(tree_map(sized, inputs))
            return functional_call(model, _fake_state(model), args, kwargs, tie_weights=False)


def _fake_state(model: nn.Module) -> dict[str, Tensor]:
    # One name for every tensor of every module: of two for the same, functional_call would put back
    # one that is a fake.
    return {
        f"{path}.{name}" if path else name: _fake(tensor)
        for path, module in model.named_modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    }


def _fake(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        return torch.empty_like(tensor, device="cpu")
    # Not of the tensor itself, all of which would first be described as a fake: ten times as long.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keeps torch from logging what cannot be faked: who calls is told by the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
