"""Finds in a trace what is added to residual streams, and which modules compute it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerprune.sections.trace import Addition, Call, Trace


@dataclass(frozen=True)
class Step:
    """A module's call on a way from one tensor to another."""

    call: Call
    input: Tensor
    output: Tensor

    @property
    def keys(self) -> tuple[int | str, ...]:
        """The arguments that are its input."""
        return tuple(key for key, value in self.call.given.items() if value is self.input)

    @property
    def place(self) -> int:
        """Where its output stands among its results."""
        return next(i for i, result in enumerate(self.call.results) if result is self.output)


@dataclass(frozen=True)
class Branch:
    """A chain of modules, each called on what the one before it gave, whose result is added.

    Attributes:
        steps: the modules' calls.
        full: whether the addition needs zeros of the input's shape if the branch is removed.
    """

    steps: tuple[Step, ...]
    full: bool


class NoBranch(ValueError):
    """An addition of which no operand can be gated; the message says why."""


def residual_additions(trace: Trace) -> Iterator[tuple[Addition, tuple[Branch, ...] | NoBranch]]:
    """The additions whose operands come from one tensor, with their branches or why there is none.

    Where both operands are chains of modules, the one with fewer weights is a shortcut, which
    stays; both are branches where their sum is added to the tensor that they come from, by an
    addition that has no further one.
    """
    sums: list[tuple[Tensor, Tensor]] = []
    for addition in trace.additions:
        if any(_adds(addition, *pair) for pair in sums):
            yield addition, ()
            continue
        left, right = (_way(trace, t, addition.time) for t in (addition.left, addition.right))
        meeting = _meeting(addition, left, right)
        if meeting is None:
            continue
        left, right, root = left[: meeting[0]], right[: meeting[1]], meeting[2]
        try:
            if addition.left is addition.right:
                raise NoBranch("adds a tensor to itself")
            chains = _branches(trace, addition, left, right, root)
            if len(chains) > 1:
                sums.append((addition.result, root))
            yield addition, tuple(_gateable(trace, addition, chain[::-1]) for chain in chains)
        except NoBranch as why:
            yield addition, why


def _way(trace: Trace, tensor: Tensor, before: int) -> list[Step]:
    """How a tensor came to be, the last call first, as far as modules follow without a gap."""
    way: list[Step] = []
    while (call := trace.producer(tensor, before)) is not None:
        given = call.first_tensor()
        if given is None:
            break
        way.append(Step(call, given, tensor))
        tensor, before = given, call.start
    return way


def _meeting(
    addition: Addition, left: list[Step], right: list[Step]
) -> tuple[int, int, Tensor] | None:
    """How many steps two ways are apart from the tensor that both come from, and that tensor."""
    ours = [addition.left, *(step.input for step in left)]
    theirs = [addition.right, *(step.input for step in right)]
    for i, tensor in enumerate(ours):
        for j, other in enumerate(theirs):
            # What two embeddings of the same numbers give is no residual stream.
            if tensor is other and (i or j) and tensor.is_floating_point():
                return i, j, tensor
    return None


def _adds(addition: Addition, one: Tensor, other: Tensor) -> bool:
    return {id(addition.left), id(addition.right)} == {id(one), id(other)}


def _branches(
    trace: Trace, addition: Addition, left: list[Step], right: list[Step], root: Tensor
) -> list[list[Step]]:
    """Which of an addition's operands are branches."""
    if not (left and right):
        return [left or right]
    if any(_adds(other, addition.result, root) for other in trace.additions):
        return [left, right]
    sizes = [sum(_matrices(step.call.module) for step in way) for way in (left, right)]
    if sizes[0] == sizes[1]:
        raise NoBranch("adds two branches alike, of which none is the shortcut")
    return [left if sizes[0] > sizes[1] else right]


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() >= 2 for parameter in module.parameters())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has neither weights nor statistics."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def _gateable(trace: Trace, addition: Addition, steps: list[Step]) -> Branch:
    """The part of a chain that can be gated.

    Raises:
        NoBranch: if there is none.
    """
    added = steps[-1].output
    full = addition.in_place and added is addition.left
    if addition.left.shape != addition.right.shape:
        raise NoBranch("adds tensors of different shapes")
    for step in steps:
        # One and the same tensor may go through several of them, as through a dropout's evaluation.
        taken = [(s.call.start, s.call.end) for s in steps if s.input is step.output]
        if added is step.output:
            # An addition in place makes the sum of it.
            taken.append((addition.time - 1, math.inf if full else addition.time))
        for time in trace.uses_of(step.output, step.call):
            if not any(start <= time <= end for start, end in taken):
                raise NoBranch(f"what {step.call.name} returns is used by others too")
    # A module that serves several branches stays where it is, at the chain's ends.
    shared = {step.call.name for step in steps if len(trace.calls[step.call.name]) > 1}
    while steps and steps[0].call.name in shared and _is_plain(steps[0].call.module):
        steps = steps[1:]
    while steps and steps[-1].call.name in shared and _is_plain(steps[-1].call.module):
        steps, full = steps[:-1], True
    kept = [step for step in steps if step.call.name not in shared]
    for call in (step.call for step in steps if step.call.name in shared):
        if not _is_plain(call.module) or getattr(call.module, "inplace", False):
            raise NoBranch(f"{call.name} is called more than once")
    if not any(_matrices(step.call.module) for step in kept):
        raise NoBranch("nothing in its branch has weights of its own")
    for step in kept:
        others = [r for r in tree_leaves(step.call.results) if isinstance(r, Tensor)]
        if any(r is not step.output and trace.uses_of(r, step.call) for r in others):
            raise NoBranch(f"{step.call.name} returns tensors that others use")
    if full and kept[0].input.shape != added.shape:
        raise NoBranch("adds in place to a branch whose input has another shape")
    return Branch(tuple(kept), full)
