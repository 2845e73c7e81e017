"""Blocks of residual branches, and the sections that can be made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from layerprune.sections.base import Section
from layerprune.sections.branch import Block, BranchSection, Link
from layerprune.sections.opaque import OpaqueAdapter
from layerprune.sections.residuals import Branch, NoBranch, residual_additions
from layerprune.sections.trace import Addition, Call, Trace


class NotGated(ValueError):
    """A module that cannot be gated; the message says why."""


@dataclass
class ResidualBlock:
    """A module that adds to what it is given.

    Attributes:
        call: its call; None for the model itself.
        found: of each addition its branches, or why they cannot be gated.
        returns_stream: whether it returns what it is given with nothing but these additions.
    """

    call: Call | None
    found: list[tuple[Branch, ...] | NoBranch] = field(default_factory=list)
    returns_stream: bool = False

    @property
    def branches(self) -> list[Branch]:
        """Those that can be gated."""
        return [branch for each in self.found if isinstance(each, tuple) for branch in each]

    def leave_out_nested(self) -> None:
        """Forgets branches within others, as of an adapter that adds to what a projection gives."""
        calls = [step.call for branch in self.branches for step in branch.steps]
        self.found = [
            found
            for found in self.found
            if not isinstance(found, tuple)
            or not found
            or not any(
                all(call.encloses(s.call) for branch in found for s in branch.steps)
                for call in calls
            )
        ]

    @property
    def is_covered(self) -> bool:
        """Whether these are all that it adds."""
        return all(isinstance(each, tuple) for each in self.found)


def residual_blocks(
    trace: Trace, stacked: Collection[str], taken: Collection[str]
) -> list[ResidualBlock]:
    """The blocks of a model, each the innermost module that holds its branches whole.

    Args:
        trace: the model's forward.
        stacked: names of the elements of containers, which are more likely blocks than others.
        taken: names of the blocks that need not be found.
    """
    known = {id(addition): found for addition, found in residual_additions(trace)}
    blocks: dict[Call | None, ResidualBlock] = {}
    streams: dict[Call, set[int]] = {}
    for addition in trace.additions:
        carrying = [call for call in addition.within if _carries(call, addition, streams)]
        if any(call.name in taken for call in addition.within):
            continue
        found, holding = known.get(id(addition)), addition.within
        if found is None:
            # What is not a chain of modules may be anything, but in a block's place.
            holding = [call for call in carrying if call.name in stacked]
            found = NoBranch("computes what it adds by more than modules called one by one")
            if not holding:
                continue
        elif isinstance(found, tuple):
            steps = [step.call for branch in found for step in branch.steps]
            holding = [c for c in addition.within if all(c.encloses(step) for step in steps)]
        owner = _innermost(holding, stacked)
        block = blocks.setdefault(owner, ResidualBlock(owner))
        block.found.append(found)
    for call, block in blocks.items():
        block.returns_stream = call is not None and id(call.results[0]) in streams.get(call, ())
        block.leave_out_nested()
    return list(blocks.values())


def _carries(call: Call, addition: Addition, streams: dict[Call, set[int]]) -> bool:
    """Whether an addition is to a call's input, or to what it has added to that before."""
    stream = streams.setdefault(call, {id(call.first_tensor())})
    carries = id(addition.left) in stream or id(addition.right) in stream
    if carries:
        stream.add(id(addition.result))
    return carries


def _innermost(calls: Sequence[Call], stacked: Collection[str]) -> Call | None:
    inner = [call for call in reversed(calls) if call.name]
    return next((call for call in inner if call.name in stacked), inner[0] if inner else None)


def opaque_section(call: Call, trace: Trace, wider: Trace) -> Section:
    """A module as an opaque section.

    Args:
        call: its call.
        trace: the forward that it is of.
        wider: the same one with some rows more.

    Raises:
        NotGated: if its calls do not show that a gate would be right.
    """
    _check_called_once(call, trace)
    x, y = call.given.get(0), call.results[0]
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape):
        raise NotGated("its output has not its input's shape")
    if _gives_more(call, trace):
        raise NotGated("it returns further tensors that others use")
    batched, shared = _arguments(call, (), trace, wider)
    if 0 not in batched or not _grows(y, wider.calls[call.name][0].results[0], trace, wider):
        raise NotGated("its input's first dimension is not the batch")
    several = len(call.given) > 1
    adapter = OpaqueAdapter(batched, several, shared, call.width)
    return Section(call.name, call.module, adapter)


def branch_section(branch: Branch, block: ResidualBlock, trace: Trace, wider: Trace) -> Section:
    """A branch as a section, named by the largest of its modules.

    Raises:
        NotGated: if its modules' calls do not show that a gate would be right.
    """
    links = []
    for step in branch.steps:
        call = step.call
        _check_called_once(call, trace)
        batched, shared = _arguments(call, step.keys, trace, wider)
        links.append(
            Link(
                call.name,
                call.module,
                keys=step.keys,
                place=step.place,
                width=call.width,
                several_arguments=len(call.given) > len(step.keys),
                batched=batched,
                shared=shared,
            )
        )
    first = branch.steps[0]
    widened = wider.calls[first.call.name][0].given[first.keys[0]]
    if not _grows(first.input, widened, trace, wider):
        raise NotGated("its input's first dimension is not the batch")
    largest = max(links, key=lambda link: sum(p.numel() for p in link.module.parameters()))
    return BranchSection(
        largest.name, largest.module, None, tuple(links), branch.shaped, _vanishing(block, trace)
    )


def _vanishing(block: ResidualBlock, trace: Trace) -> Block | None:
    """The block, where it does nothing once its branches are gone."""
    call = block.call
    if call is None or not (block.returns_stream and block.is_covered):
        return None
    if len(trace.calls[call.name]) > 1 or not isinstance(call.given.get(0), Tensor):
        return None
    if _gives_more(call, trace):
        return None
    # What is written in place leaves the stream the same tensor, and yet another one.
    steps = [step.call for branch in block.branches for step in branch.steps]
    for time in trace.writes:
        if call.start < time < call.end and not any(s.start < time < s.end for s in steps):
            return None
    link = Link(call.name, call.module, width=call.width, several_arguments=len(call.given) > 1)
    ends = [branch.steps[-1].call.name for branch in block.branches]
    return Block(link, tuple(end.removeprefix(f"{call.name}.") for end in ends))


def _gives_more(call: Call, trace: Trace) -> bool:
    """Whether others use what a module returns besides its first result."""
    return any(isinstance(r, Tensor) and trace.uses_of(r, call) for r in call.results[1:])


def _check_called_once(call: Call, trace: Trace) -> None:
    if len(trace.calls[call.name]) > 1:
        raise NotGated("it is called more than once in a forward")


def _grows(tensor: Tensor, widened: Tensor | None, trace: Trace, wider: Trace) -> bool:
    """Whether a tensor has the batch's rows in its first dimension, and nowhere else."""
    if widened is None or tensor.dim() == 0 or widened.shape[1:] != tensor.shape[1:]:
        return False
    return widened.shape[0] - tensor.shape[0] == wider.rows - trace.rows


def _arguments(
    call: Call, inputs: tuple[int | str, ...], trace: Trace, wider: Trace
) -> tuple[frozenset, frozenset]:
    """Where a call's further arguments hold tensors with the batch, and where ones without."""
    given = dict(_tensors({k: v for k, v in call.given.items() if k not in inputs}))
    widened = dict(_tensors(wider.calls[call.name][0].given))
    batched = set()
    for path, tensor in given.items():
        other = widened.get(path)
        if other is not None and other.shape == tensor.shape:
            continue
        if not _grows(tensor, other, trace, wider):
            raise NotGated(f"its argument {path!r} follows the batch otherwise than by its rows")
        batched.add(path)
    return frozenset(batched), frozenset(given) - batched


def _tensors(value: object, path: object = None) -> Iterator[tuple[object, Tensor]]:
    """The tensors in nested containers, by position or name; see `arithmetic.running_rows`."""
    if isinstance(value, Tensor):
        yield path, value
    items = ()
    if type(value) in (tuple, list):
        items = enumerate(value)
    elif type(value) is dict:
        items = value.items()
    for place, each in items:
        yield from _tensors(each, place if path is None else (path, place))
