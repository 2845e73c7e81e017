"""What a section's branch takes of a training step: its forward and backward, measured."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from layerprune.calls import Inputs, as_call, flags_kept
from layerprune.sections import Section
from layerprune.side_forward import side_forward

_VISIT = 20e-3
"""Seconds that a section is run for at a time: a shorter time is too much the scheduler's."""
_MOST_RUNS = 20
"""Runs at a time at the most: each has arguments of its own."""


def section_latencies(
    model: nn.Module, example_inputs: Inputs, sections: Sequence[Section], repeats: int = 10
) -> dict[str, float]:
    """Seconds that each section's branch takes, forward and backward, in training mode.

    One forward of the model shows what the branches are called with; then each is run alone, on
    its device and in the precision that autocast says here, by eager code also where the model is
    compiled. They take turns, so that all meet a machine that slows down alike. What stays when a
    branch goes is left out. A backward goes to the parameters and inputs that need a gradient in
    the model.

    Args:
        model: left as it is: parameters' gradients, buffers, modes and random states too. One in
            evaluation mode is measured with all modules in training mode.
        example_inputs: a batch as in training; a smaller one has other proportions.
        sections: the model's, without gates.
        repeats: turns of each section, of which the median counts.

    Returns:
        The seconds by section name.

    Raises:
        ValueError: if the model does not run in training mode with ``example_inputs``, or a
            section's branch takes no part in that.
    """
    device = next(model.parameters()).device
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise _unmeasurable("it is on the meta device, where nothing is computed")
    try:
        with _side_training(model):
            branches = _called(model, example_inputs, sections, device)
            runs = [branch.warm_up() for branch in branches]
            turns = [
                [b.seconds(n) for b, n in zip(branches, runs, strict=True)] for _ in range(repeats)
            ]
    except Exception as error:  # whatever the model's own code raises
        raise _unmeasurable(str(error)) from error
    medians = map(statistics.median, zip(*turns, strict=True))
    return dict(zip((section.name for section in sections), medians, strict=True))


def _unmeasurable(reason: str) -> ValueError:
    return ValueError(
        f'cost="latency" cannot be measured on this model: {reason}. Put the model on the device '
        "that it is trained on and give example_inputs that it can be trained on, a whole batch; "
        'or choose another cost, such as "flops"'
    )


@contextmanager
def _side_training(model: nn.Module) -> Iterator[None]:
    with side_forward(model), torch.enable_grad(), flags_kept(model):
        if not model.training:
            model.train()
        yield


class _Copies(TorchFunctionMode):
    """Lets `copy.deepcopy` copy tensors that have a graph, and each of them once.

    Args:
        copied: makes the copy of a tensor.

    Attributes:
        known: tensors and their copies, by identity and version.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._copied = copied

    def __torch_function__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor = args[0]
        key = (id(tensor), tensor._version)
        if key not in self.known:
            self.known[key] = (tensor, self._copied(tensor))
        return self.known[key][1]


class _Branch:
    """A section's branch, to be run alone.

    Arguments are copied for each run: the branch may write into them, or add to a cache.

    Args:
        section: the section.
        shared: what is not copied along, by identity.
        device: where it runs.
    """

    def __init__(self, section: Section, shared: dict[int, object], device: torch.device) -> None:
        self.name = section.name
        self.calls: list[tuple[Callable[..., Tensor], tuple[tuple, dict]]] = []
        self._parameters = [p for p in section.branch_parameters() if p.requires_grad]
        self._shared = shared
        self._device = device
        self._gradients: list[Tensor] = []

    def warm_up(self) -> int:
        """Runs it twice, the second time to find how many runs make a turn.

        Raises:
            ValueError: if it was never called.
        """
        if not self.calls:
            raise ValueError(f"the branch of section {self.name!r} does not run in its forward")
        self.seconds(1)
        return min(_MOST_RUNS, math.ceil(_VISIT / self.seconds(1)))

    def seconds(self, runs: int) -> float:
        """What a run takes, the mean of some."""
        given = [self._arguments() for _ in range(runs)]
        start = self._clock()
        for calls, inputs in given:
            self._run(calls, inputs)
        return (self._clock() - start) / runs

    def _clock(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def _arguments(self) -> tuple[list[tuple[tuple, dict]], list[Tensor]]:
        """Each call's, no leaves of the graph, and those that they are copies of."""
        with _Copies(Tensor.clone) as copies:
            calls = [copy.deepcopy(given, dict(self._shared)) for _, given in self.calls]
        return calls, [leaf for leaf, _ in copies.known.values() if leaf.requires_grad]

    def _run(self, calls: list[tuple[tuple, dict]], inputs: list[Tensor]) -> None:
        torch.clear_autocast_cache()  # each step casts the weights anew
        outputs = [
            function(*args, **kwargs)
            for (function, _), (args, kwargs) in zip(self.calls, calls, strict=True)
        ]
        outputs = [output for output in outputs if output.requires_grad]
        wanted = [*inputs, *self._parameters]
        if not (outputs and wanted):
            return
        if not self._gradients:
            self._gradients = [torch.randn_like(output) for output in outputs]
        # Not `backward`: that would add to the parameters' gradients, and call who waits for them.
        torch.autograd.grad(outputs, wanted, self._gradients, allow_unused=True)


def _called(
    model: nn.Module, inputs: Inputs, sections: Sequence[Section], device: torch.device
) -> list[_Branch]:
    """The sections' branches with the arguments that a forward of the model calls them with."""
    shared = {id(each): each for each in (*model.modules(), *model.parameters())}
    branches = [_Branch(section, shared, device) for section in sections]
    # Sections share masks and the like: one copy serves all.
    copies = _Copies(lambda t: t.detach().clone().requires_grad_(t.requires_grad))

    def noting(branch: _Branch, function: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            with copies:
                branch.calls.append((function, copy.deepcopy((args, kwargs), dict(shared))))

        return hook

    handles = [
        # Ahead of other hooks, which see the call again when it is run alone.
        module.register_forward_pre_hook(noting(branch, function), prepend=True, with_kwargs=True)
        for branch, section in zip(branches, sections, strict=True)
        for module, function in section.branch_calls()
    ]
    try:
        args, kwargs = tree_map(lambda leaf: _moved(leaf, device), as_call(inputs))
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return branches


def _moved(leaf: object, device: torch.device) -> object:
    """A tensor's copy on a device; the model may write into it."""
    return leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf
