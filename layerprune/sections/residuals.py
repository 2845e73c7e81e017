"""Finds in a trace what is added to residual streams, and which modules compute it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
        shaped: whether the addition needs zeros of the input's shape where the branch was.
    """

    steps: tuple[Step, ...]
    shaped: bool


class NoBranch(ValueError):
    """An addition of which no operand can be gated; the message says why."""


def residual_additions(trace: Trace) -> Iterator[tuple[Addition, tuple[Branch, ...] | NoBranch]]:
    """The additions whose operands come from one tensor, with their branches or why there is none.

    Where both operands are chains of modules, the one with fewer weights is a shortcut, which
    stays; both are branches where their sum is added to a tensor that they come from
    (``x + (a(x) + m(x))``), by an addition that has no further one. A sum that holds that tensor
    does for it (``(x + a(x)) + m(x)``).
    """
    totals: list[Addition] = []
    held: dict[int, _Sum] = {}
    for addition in trace.additions:
        if addition in totals:
            yield addition, ()
            continue
        left, right = (_way(trace, t, addition.time) for t in (addition.left, addition.right))
        meeting = _meeting(addition, left, right, held)
        if meeting is None:
            continue
        left, right, root = left[: meeting[0]], right[: meeting[1]], meeting[2]
        if not (left and right):
            held[id(addition.result)] = _Sum(addition, addition.right if left else addition.left)
        try:
            if addition.left is addition.right:
                raise NoBranch("adds a tensor to itself")
            total = _total(trace, addition, root) if left and right else None
            if total is not None:
                totals.append(total)
            chains = [left, right] if total else [_branch(left, right)]
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


@dataclass(frozen=True)
class _Sum:
    """What was added to a tensor that is in the sum as it was."""

    addition: Addition
    term: Tensor


def _meeting(
    addition: Addition, left: list[Step], right: list[Step], held: Mapping[int, _Sum]
) -> tuple[int, int, Tensor] | None:
    """How many steps two ways are apart from the tensor that both come from, and that tensor."""
    ours = [addition.left, *(step.input for step in left)]
    theirs = [addition.right, *(step.input for step in right)]
    for i, tensor in enumerate(ours):
        for j, other in enumerate(theirs):
            # What two embeddings of the same numbers give is no residual stream.
            if tensor is other and (i or j) and tensor.is_floating_point():
                return i, j, tensor
    for term in _terms(addition, addition.left, held):
        for j, other in enumerate(theirs[1:], start=1):
            if term is other:
                return 0, j, term
    for term in _terms(addition, addition.right, held):
        for i, tensor in enumerate(ours[1:], start=1):
            if term is tensor:
                return i, 0, term
    return None


def _terms(addition: Addition, tensor: Tensor, held: Mapping[int, _Sum]) -> Iterator[Tensor]:
    """What else a term of an addition holds as it was, of the same module's additions."""
    while (found := held.get(id(tensor))) is not None and found.term is not tensor:
        if found.addition.within != addition.within:
            return
        tensor = found.term
        yield tensor


def _total(trace: Trace, addition: Addition, root: Tensor) -> Addition | None:
    """The addition of a sum of two branches to a tensor that they come from."""
    origins = [root, *(step.input for step in _way(trace, root, addition.time))]
    for other in trace.additions:
        if other.within != addition.within:
            continue  # another module's: the sum is all of that one's branch
        for one, rest in ((other.left, other.right), (other.right, other.left)):
            if one is addition.result and any(rest is origin for origin in origins):
                return other
    return None


def _branch(left: list[Step], right: list[Step]) -> list[Step]:
    """Which of an addition's operands is a branch, where the other one is the shortcut."""
    if not (left and right):
        return left or right
    sizes = [sum(_matrices(step.call.module) for step in way) for way in (left, right)]
    if sizes[0] == sizes[1]:
        raise NoBranch("adds two branches alike, of which none is the shortcut")
    return left if sizes[0] > sizes[1] else right


def _matrices(module: nn.Module) -> int:
    return sum(parameter.dim() >= 2 for parameter in module.parameters())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has neither weights nor statistics."""
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def _has_other_uses(
    trace: Trace, addition: Addition, steps: list[Step], step: Step, shaped: bool
) -> bool:
    """Whether what a step of a chain gives is taken by others than the chain and its addition."""
    # One and the same tensor may go through several steps, as through a dropout's evaluation.
    taken = [(s.call.start, s.call.end) for s in steps if s.input is step.output]
    if steps[-1].output is step.output:
        # An addition in place makes the sum of it.
        taken.append((addition.time - 1, math.inf if shaped else addition.time))
    uses = trace.uses_of(step.output, step.call)
    return not all(any(start <= time <= end for start, end in taken) for time in uses)


def _gateable(trace: Trace, addition: Addition, steps: list[Step]) -> Branch:
    """The part of a chain that can be gated.

    Raises:
        NoBranch: if there is none.
    """
    added = steps[-1].output
    shaped = addition.in_place and added is addition.left
    if addition.left.shape != addition.right.shape:
        raise NoBranch("adds tensors of different shapes")
    # What is in front of several branches, such as a norm, stays for the others.
    serving = [s for s in steps if _has_other_uses(trace, addition, steps, s, shaped)]
    if serving:
        steps = steps[steps.index(serving[-1]) + 1 :]
        if not any(_matrices(step.call.module) for step in steps):
            raise NoBranch(f"what {serving[-1].call.name} returns is used by others too")
    # A module that serves several branches stays where it is, at the chain's ends.
    shared = {step.call.name for step in steps if len(trace.calls[step.call.name]) > 1}
    while steps and steps[0].call.name in shared and _is_plain(steps[0].call.module):
        steps = steps[1:]
    while steps and steps[-1].call.name in shared and _is_plain(steps[-1].call.module):
        steps, shaped = steps[:-1], True
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
    if shaped and kept[0].input.shape != added.shape:
        raise NoBranch("adds in place to a branch whose input has another shape")
    return Branch(tuple(kept), shaped)
