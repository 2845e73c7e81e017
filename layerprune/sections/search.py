"""Which sections to make of the blocks that a trace shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from layerprune.sections.base import Section
from layerprune.sections.blocks import (
    NotGated,
    ResidualBlock,
    branch_section,
    opaque_section,
    residual_blocks,
)
from layerprune.sections.recording import Recording
from layerprune.sections.residuals import NoBranch


@dataclass
class Candidate:
    """What may be made of a block.

    Attributes:
        sections: it.
        lacks: why a part of the block has no gate then; None if every part has one.
        is_whole: whether it is the block as one section.
    """

    sections: list[Section]
    lacks: str | None = None
    is_whole: bool = False

    def failing(self, why: str) -> str:
        """How it is said that it does not run."""
        return f"as a whole: {why}" if self.is_whole else why


@dataclass
class Choice:
    """What to make of one block: the first of its candidates with which the model runs.

    Attributes:
        name: the block's.
        kind: its class: what runs for one runs for all.
        candidates: in the order of preference.
    """

    name: str
    kind: type
    candidates: list[Candidate]


class Search:
    """Makes sections of what a trace shows.

    Args:
        model: the model.
        ignored: what to leave ungated.
        recording: its forward.
        taken: names of the sections known without.

    Attributes:
        left_out: the reason, by name of the block.
    """

    def __init__(
        self, model: nn.Module, ignored: tuple, recording: Recording, taken: list[str]
    ) -> None:
        self.left_out: dict[str, str] = {}
        self._ignored, self._taken = ignored, taken
        self._trace, self._wider = recording.trace, recording.wider
        self._stacked = dict(_stack_elements(model))
        self._looked_into = _looked_into(model)

    def residual_choices(self) -> list[Choice]:
        """Of the blocks that add something to what they are given."""
        choices: list[Choice] = []
        blocks = residual_blocks(self._trace, self._stacked, self._taken)
        # The inner one of nested blocks comes first.
        for block in sorted(blocks, key=lambda b: math.inf if b.call is None else b.call.end):
            call = block.call
            name = "" if call is None else call.name
            there = [*self._taken, *(choice.name for choice in choices)]
            if name in there or is_inside(name, there):
                continue
            if call is not None and is_ignored(name, call.module, self._ignored):
                continue
            if name in self._looked_into:
                self.left_out[name] = "torch's own forward looks into the first layer"
                continue
            parts, whole = self._parts(block, there), self._whole(block, there)
            candidates = [whole, parts]
            if len(parts.sections) > 1 and block.is_covered:
                candidates = [parts, whole]
            possible = [candidate for candidate in candidates if candidate.sections]
            if possible:
                choices.append(Choice(name, type(call and call.module), possible))
            elif parts.lacks:
                self.left_out[name] = parts.lacks
                if whole.lacks:
                    self.left_out[name] += f"; as a whole: {whole.lacks}"
        return choices

    def plain_choices(self) -> list[Choice]:
        """Of stacked blocks, in a model without residual connections."""
        choices: list[Choice] = []
        # A block before a plain sequence of blocks: the sequence is more likely a stage.
        elements = sorted(self._stacked.items(), key=lambda e: isinstance(e[1], nn.Sequential))
        for name, module in elements:
            names = [choice.name for choice in choices]
            nested = is_inside(name, names) or any(is_inside(other, [name]) for other in names)
            if nested or name not in self._trace.calls or is_ignored(name, module, self._ignored):
                continue
            if name in self._looked_into:
                continue
            try:
                section = opaque_section(self._trace.calls[name][0], self._trace, self._wider)
            except NotGated:
                continue
            choices.append(Choice(name, type(module), [Candidate([section])]))
        return choices

    def _whole(self, block: ResidualBlock, there: list[str]) -> Candidate:
        call = block.call
        if call is None or (call.name not in self._stacked and not block.is_covered):
            return Candidate([])  # it may be any part of a model
        try:
            if any(is_inside(name, [call.name]) for name in there):
                raise NotGated("it holds other sections")
            return Candidate([opaque_section(call, self._trace, self._wider)], is_whole=True)
        except NotGated as why:
            return Candidate([], str(why))

    def _parts(self, block: ResidualBlock, there: list[str]) -> Candidate:
        sections = []
        reasons = [str(found) for found in block.found if isinstance(found, NoBranch)]
        for branch in block.branches:
            try:
                section = branch_section(branch, block, self._trace, self._wider)
            except NotGated as why:
                reasons.append(str(why))
                continue
            links = [link.name for link in section.links]
            holds = any(is_inside(name, links) for name in there)
            if holds or any(is_inside(link, there) for link in links):
                reasons.append("its branch holds other sections")
            elif not any(is_ignored(k.name, k.module, self._ignored) for k in section.links):
                sections.append(section)
        return Candidate(sections, reasons[0] if reasons else None)


def that_run(
    choices: Sequence[Choice],
    left_out: dict[str, str],
    failing: Callable[[list[Section]], str | None],
) -> list[Section]:
    """The sections with which the model runs.

    Args:
        choices: of the blocks.
        left_out: where those that lack a section are put, with the reason.
        failing: tells why a model does not run with some sections gated.
    """
    first = {choice.name: choice.candidates[0] for choice in choices}
    sections = _sections_of(first)
    if not sections or failing(sections) is None:
        return _taken(first, left_out)
    running = []
    for kind in dict.fromkeys(choice.kind for choice in choices):
        alike = [choice for choice in choices if choice.kind is kind]
        reasons = []
        for number in range(max(len(choice.candidates) for choice in alike)):
            tried = {c.name: c.candidates[number] for c in alike if number < len(c.candidates)}
            # With those found before: what runs alone may not run together.
            reasons.append(failing([*running, *_sections_of(tried)]))
            if reasons[-1] is None:
                running += _taken(tried, left_out)
                break
        else:
            tried = {}
        for choice in alike:
            if choice.name not in tried:
                told = zip(choice.candidates, reasons, strict=False)
                left_out[choice.name] = "; ".join(each.failing(why) for each, why in told)
    return running


def _sections_of(candidates: Mapping[str, Candidate]) -> list[Section]:
    return [section for each in candidates.values() for section in each.sections]


def _taken(candidates: Mapping[str, Candidate], left_out: dict[str, str]) -> list[Section]:
    left_out |= {name: each.lacks for name, each in candidates.items() if each.lacks}
    return _sections_of(candidates)


def is_ignored(name: str, module: nn.Module, ignored: tuple) -> bool:
    """Whether a module is one of those, of such a type, or has such a name."""
    for entry in ignored:
        if isinstance(entry, str):
            if re.fullmatch(entry, name):
                return True
        elif isinstance(entry, type):
            if isinstance(module, entry):
                return True
        elif entry is module:
            return True
    return False


def is_inside(name: str, taken: list[str]) -> bool:
    """Whether a module of this name is a part of one of those."""
    return any(name.startswith(f"{outer}.") for outer in taken)


def _stack_elements(model: nn.Module) -> list[tuple[str, nn.Module]]:
    elements = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            for key, child in module.named_children():
                composite = next(child.children(), None) is not None
                if composite and any(p.dim() >= 2 for p in child.parameters()):
                    elements.append((f"{name}.{key}" if name else key, child))
    return elements


def _looked_into(model: nn.Module) -> set[str]:
    """Names of layers whose attributes another module's forward reads: they have to stay."""
    return {
        f"{name}.layers.0".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder)
    }
