"""How a model is called: its inputs, their batch, and the modes that it is called in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
