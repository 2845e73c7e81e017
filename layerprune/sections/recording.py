"""Writes down what a model's forward does, as `trace` has it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from layerprune.calls import Inputs, batch_size_of, batch_tensors
from layerprune.dry_run import FEW, DryRuns
from layerprune.sections.trace import Addition, Call, Trace

_ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_IN_PLACE = (Tensor.add_, Tensor.__iadd__)
_MORE = 5
"""Rows by which the second forward has more: no other dimension is to grow by them by chance."""


class _Functions(TorchFunctionMode):
    """Tells a recorder what functions do with tensors."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        time = self._recorder.time()
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in taken]
        result = function(*args, **(kwargs or {}))
        in_place = function in _IN_PLACE
        plain = len(args) == 2 and not kwargs and all(isinstance(each, Tensor) for each in args)
        if plain and (function in _ADDITIONS or in_place):
            self._recorder.added(*args, result, in_place)
        elif any(t._version != v for t, v in zip(taken, versions, strict=True)):
            self._recorder.trace.writes.append(time)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            # What comes back as it was, as from a dropout in evaluation, has not been used.
            self._recorder.trace.uses += [(time, t) for t in taken if t is not result]
        return result


class _Recorder:
    """Hooks on all modules that fill a trace.

    Args:
        running: the model that runs.
        model: the one whose modules are written down: itself, or what it is a copy of.
        rows: of the forward.
    """

    def __init__(self, running: nn.Module, model: nn.Module, rows: int) -> None:
        self.trace = Trace(rows)
        self._running = running
        self._named = dict(model.named_modules())
        self._clock = itertools.count()
        self._open: list[Call] = []
        self._handles = []

    def __enter__(self) -> _Recorder:
        for name, module in self._running.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no such hooks
                enter, leave = self._enter(name), self._leave
                self._handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True),
                ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def added(self, left: Tensor, right: Tensor, result: Tensor, in_place: bool) -> None:
        addition = Addition(left, right, result, in_place, next(self._clock), tuple(self._open))
        self.trace.additions.append(addition)

    def time(self) -> int:
        return next(self._clock)

    def _enter(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = {**dict(enumerate(args)), **kwargs}
            call = Call(name, self._named[name], given, next(self._clock))
            self._open.append(call)

        return hook

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
        call = self._open.pop()
        several = type(result) is tuple
        call.results = result if several else (result,)
        call.width = len(result) if several else None
        call.end = next(self._clock)
        self.trace.calls.setdefault(call.name, []).append(call)


@dataclass
class Recording:
    """A model's forward in evaluation mode, with two numbers of rows.

    Attributes:
        trace: with few rows.
        wider: with some more.
        resized: the inputs that carry the batch.
        runs: what makes such forwards.
    """

    trace: Trace
    wider: Trace
    resized: tuple[Tensor, ...]
    runs: DryRuns


def record(model: nn.Module, inputs: Inputs) -> Recording:
    """Traces a model's forward: on fake tensors, or on real ones where it does not run with these.

    Raises:
        ValueError: if the model does not run with ``inputs``.
    """
    rows = batch_size_of(inputs)
    errors = []
    for real, first, second in (
        (False, rows, rows + _MORE),
        (False, rows, 2 * rows),  # they may have to be even
        (True, min(rows, FEW), min(rows, FEW) + _MORE),
        (True, rows, 2 * rows),
    ):
        try:
            runs = DryRuns(model, inputs, real)
        except Exception as error:  # it has no copy
            errors.append(error)
            continue
        for resized in _resizings(inputs):
            try:
                traces = [_traced(runs, model, n, resized) for n in (first, second)]
            except Exception as error:
                errors.append(error)
            else:
                return Recording(*traces, resized, runs)
    raise ValueError(
        f"the model does not run with {rows} rows of example_inputs, or not with other numbers of "
        f"rows: {errors[-1]}. Give inputs as the training loop does, with the batch in the first "
        "dimension"
    ) from errors[-1]


def _resizings(inputs: Inputs) -> Iterator[tuple[Tensor, ...]]:
    """The inputs that may carry the batch, in the order to try.

    A mask, say, may have as many rows as the batch without being one: none is left out, one, two,
    or all.
    """
    first, *others = batch_tensors(inputs)
    for left_out in sorted({0, 1, 2, len(others)} & {*range(len(others) + 1)}):
        for kept in itertools.combinations(others, len(others) - left_out):
            yield (first, *kept)


def _traced(runs: DryRuns, model: nn.Module, rows: int, resized: tuple[Tensor, ...]) -> Trace:
    with _Recorder(runs.model, model, rows) as recorder, _Functions(recorder):
        output = runs.run(rows, resized)
    recorder.trace.shapes = shapes(output)
    recorder.trace.index()
    return recorder.trace


def shapes(output: object) -> list[tuple[int, ...]]:
    """Of the tensors in what a model returned."""
    return [tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
