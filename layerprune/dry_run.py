"""Forwards for the sake of their shapes, on fake tensors wherever that is possible."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import isfunction

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from layerprune.calls import Inputs, as_call, batch_tensors, evaluating, plain_attention
from layerprune.side_forward import side_forward

FEW = 2
"""Rows of a dry run on real tensors: it computes."""


class DryRuns:
    """Runs a model in evaluation mode, for its outputs' shapes.

    A copy of it, of fake tensors, which have no values: whatever its forward keeps (buffers, tables
    for a length) stays in the copy. Or itself, on its device, for models that look at values, that
    have operations without a fake form, or that cannot be copied. Not on the meta device: there,
    models that ask whether anybody exports them (transformers' do, before they look into a mask)
    are not told so.

    Args:
        model: left as it is, but for what a real forward keeps outside its buffers.
        inputs: example inputs.
        real: whether to compute.

    Attributes:
        model: what is run: the copy, or the model.
        real: as given.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, real: bool = False) -> None:
        self.real = real
        self._inputs = inputs
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model if real else self._copy(model)

    def run(self, rows: int | None = None, resized: Sequence[Tensor] | None = None) -> object:
        """Runs it once.

        Args:
            rows: to run on; ``None`` for as many as the example has.
            resized: the tensors of the inputs that get this number of rows; ``None`` for all that
                may carry the batch.

        Returns:
            Whatever the model returns.
        """
        chosen = batch_tensors(self._inputs) if resized is None else resized
        chosen = set() if rows is None else set(map(id, chosen))

        def sized(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            count = rows if id(leaf) in chosen else None
            return self._repeated(leaf, count) if self.real else self._faked(leaf, count)

        # torch's fused attention in evaluation mode makes nested tensors, which have no fake form;
        # and of attention's kernels, the flop counter knows only what the plain one is made of.
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(plain_attention())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.real:
                stack.enter_context(side_forward(self.model))
            else:
                stack.enter_context(torch.no_grad())
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(_without_reports())
                stack.callback(_forget_fakes, self.model)
                stack.enter_context(self._fakes)
            args, kwargs = as_call(tree_map(sized, self._inputs))
            return self.model(*args, **kwargs)

    def _repeated(self, tensor: Tensor, rows: int | None) -> Tensor:
        parameter = next(self.model.parameters(), None)
        tensor = tensor if parameter is None else tensor.to(parameter.device)
        return tensor if rows is None else tensor[torch.arange(rows) % tensor.shape[0]]

    def _faked(self, tensor: Tensor, rows: int | None) -> Tensor:
        shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
        return torch.empty(shape, dtype=tensor.dtype, device="cpu")

    def _copy(self, model: nn.Module) -> nn.Module:
        """The model with fakes for its parameters and buffers."""
        known = {}
        with self._fakes:
            for tensor in itertools.chain(model.parameters(), model.buffers()):
                known[id(tensor)] = _fake(tensor)
        return copy.deepcopy(model, known)


def _fake(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        # Not of the tensor itself, all of which would first be described as a fake: ten times as
        # long.
        form = (tensor.shape, tensor.stride())
        fake = torch.empty_strided(*form, dtype=tensor.dtype, device="cpu")
    else:
        fake = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _forget_fakes(model: nn.Module) -> None:
    """Clears caches of functions, near the classes of a model's modules, that now hold fakes.

    They would give them to the next who asks.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    files = {sys.modules.get(kind.__module__) for kind in kinds} - {None}
    for space in itertools.chain(kinds, files):
        for value in list(vars(space).values()):
            value = getattr(value, "__func__", value)  # of a static method
            cells = value.__closure__ or () if isfunction(value) else ()
            for each in (value, *gc.get_referents(*cells)):
                if isinstance(each, functools._lru_cache_wrapper) and _holds_fakes(each):
                    each.cache_clear()


def _holds_fakes(cache: object) -> bool:
    seen, waiting = set(), [cache]
    while waiting:
        for held in gc.get_referents(waiting.pop()):
            if isinstance(held, FakeTensor):
                return True
            # Of a cache its table, in which entries of a type of their own hold the results.
            inside = type(held) in (dict, list, tuple) or type(held).__name__ == "_lru_list_elem"
            if inside and id(held) not in seen:
                seen.add(id(held))
                waiting.append(held)
    return False


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keeps torch from logging what cannot be faked: who calls is told by the error."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
