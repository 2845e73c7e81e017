"""Finds the sections of a model."""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from torch import nn

from layerprune.cost import Inputs
from layerprune.sections.base import Adapter, ResidualAdapter, Section
from layerprune.sections.blocks import (
    NotGated,
    ResidualBlock,
    branch_section,
    opaque_section,
    residual_blocks,
)
from layerprune.sections.residual import GatedResidual
from layerprune.sections.residuals import NoBranch
from layerprune.sections.trace import Trace, record
from layerprune.sections.trial import failure

Ignored = Iterable[nn.Module | type[nn.Module] | str]


@functools.cache
def _twins_for(library: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"layerprune.sections.{library}")
    except ImportError:  # another version, with its blocks elsewhere
        return None


def _known_libraries() -> list[ModuleType]:
    """Our modules for the libraries of models that somebody has imported: no others are here."""
    found = [_twins_for(name) for name in ("torchvision", "timm") if name in sys.modules]
    return [library for library in found if library is not None]


def forward_order(module: nn.Module) -> tuple[str, ...]:
    """The children that a module runs one on the output of another; none where that is not known.

    ``nn.Sequential`` and known networks, by their exact class.
    """
    if type(module) is nn.Sequential:
        return tuple(module._modules)
    for library in _known_libraries():
        if type(module) in library.FORWARD_ORDER:
            return library.FORWARD_ORDER[type(module)]
    return ()


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a `GatedResidual` or a known block, gated already or not."""
    if isinstance(module, GatedResidual):
        return ResidualAdapter()
    for library in _known_libraries():
        for adapter in library.ADAPTERS:
            if type(module) in (adapter.original, adapter.twin):
                return adapter
    return None


@dataclass
class Survey:
    """What of a model can be gated, and what cannot.

    Attributes:
        sections: in the order of ``model.named_modules()``.
        left_out: residual blocks, and branches of them, without a gate: the reason by name.
    """

    sections: list[Section] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def find_sections(model: nn.Module, example_inputs: Inputs, ignored: Ignored = ()) -> list[Section]:
    """Finds what can be gated; `survey` also tells what cannot.

    Args:
        model: any module; left as it is.
        example_inputs: what the model is called with: a tensor, a sequence of positional or a
            mapping of keyword arguments. The first tensor's first dimension is the batch.
        ignored: modules, module types or regular expressions (matched against the whole qualified
            name) to leave ungated.

    Returns:
        The sections in the order of ``model.named_modules()``.

    Raises:
        ValueError: if the model does not run with ``example_inputs``.
    """
    return survey(model, example_inputs, ignored).sections


def survey(model: nn.Module, example_inputs: Inputs, ignored: Ignored = ()) -> Survey:
    """Finds what can be gated: `GatedResidual`s, known blocks, and what a forward shows.

    Two forwards of fake tensors, with B rows and with more, show what is added to what. A block
    with several branches that are each a chain of modules, such as attention and MLP, has a section
    for each (``"branch"``); another block whose output has its input's shape is one as a whole
    (``"opaque"``). In a model without any residual connection the elements of its ``Sequential``s
    and ``ModuleList``s are taken for blocks, where they have weights and leave the shape as it is.

    Args:
        model: as in `find_sections`.
        example_inputs: as in `find_sections`.
        ignored: as in `find_sections`; a block that is ignored has no section inside.

    Raises:
        ValueError: if the model does not run with ``example_inputs``.
    """
    ignored = (ignored,) if isinstance(ignored, str) else tuple(ignored)
    known = _known_sections(model, ignored)
    trace, wider, resized = record(model, example_inputs)
    search = _Search(model, ignored, trace, wider, [section.name for section in known])
    choices = search.residual_choices()
    if not (known or choices):
        choices = search.plain_choices()
    found = Survey(known, search.left_out)
    found.sections += _that_run(
        choices, found.left_out, lambda tried: failure(model, example_inputs, resized, wider, tried)
    )
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sections.sort(key=lambda section: order[section.name])
    return found


def _known_sections(model: nn.Module, ignored: tuple) -> list[Section]:
    sections: list[Section] = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is None or not name or _is_ignored(name, module, ignored):
            continue
        if not _inside(name, [section.name for section in sections]):
            sections.append(Section(name, module, adapter))
    return sections


@dataclass
class _Choice:
    """What to make of one block: the first of its candidates with which the model runs.

    Attributes:
        name: the block's.
        kind: its class: what runs for one runs for all.
        candidates: lists of sections.
    """

    name: str
    kind: type
    candidates: list[list[Section]]


class _Search:
    """Makes sections of what a trace shows.

    Args:
        model: the model.
        ignored: what to leave ungated.
        trace: its forward.
        wider: the same with some rows more.
        taken: names of the sections known without.

    Attributes:
        left_out: the reason, by name of the block.
    """

    def __init__(
        self, model: nn.Module, ignored: tuple, trace: Trace, wider: Trace, taken: list[str]
    ) -> None:
        self.left_out: dict[str, str] = {}
        self._ignored, self._trace, self._wider, self._taken = ignored, trace, wider, taken
        self._stacked = dict(_stack_elements(model))
        self._looked_into = _looked_into(model)

    def residual_choices(self) -> list[_Choice]:
        """Of the blocks that add something to what they are given."""
        choices: list[_Choice] = []
        blocks = residual_blocks(self._trace, self._stacked, self._taken)
        # The inner one of nested blocks comes first.
        for block in sorted(blocks, key=lambda b: math.inf if b.call is None else b.call.end):
            call = block.call
            name = "" if call is None else call.name
            there = [*self._taken, *(choice.name for choice in choices)]
            if name in there or _inside(name, there):
                continue
            if call is not None and _is_ignored(name, call.module, self._ignored):
                continue
            reasons = [str(found) for found in block.found if isinstance(found, NoBranch)]
            if name in self._looked_into:
                self.left_out[name] = "torch's own forward looks into the first layer"
                continue
            parts, whole = self._parts(block, there, reasons), self._whole(block, there, reasons)
            candidates = [whole, parts]
            if len(parts) > 1 and block.is_covered:
                candidates = [parts, whole]
            candidates = [candidate for candidate in candidates if candidate]
            if candidates:
                choices.append(_Choice(name, type(call and call.module), candidates))
            if reasons and not (whole or parts and block.is_covered):
                self.left_out[name] = reasons[0]
        return choices

    def plain_choices(self) -> list[_Choice]:
        """Of stacked blocks, in a model without residual connections."""
        choices: list[_Choice] = []
        # A block before a plain sequence of blocks: the sequence is more likely a stage.
        elements = sorted(self._stacked.items(), key=lambda e: isinstance(e[1], nn.Sequential))
        for name, module in elements:
            names = [choice.name for choice in choices]
            nested = _inside(name, names) or any(_inside(other, [name]) for other in names)
            if nested or name not in self._trace.calls or _is_ignored(name, module, self._ignored):
                continue
            if name in self._looked_into:
                continue
            try:
                section = opaque_section(self._trace.calls[name][0], self._trace, self._wider)
            except NotGated:
                continue
            choices.append(_Choice(name, type(module), [[section]]))
        return choices

    def _whole(self, block: ResidualBlock, there: list[str], reasons: list[str]) -> list[Section]:
        call = block.call
        if call is None:
            return []
        if call.name not in self._stacked and not block.is_covered:
            return []  # it may be any part of a model
        try:
            if any(_inside(name, [call.name]) for name in there):
                raise NotGated("it holds other sections")
            return [opaque_section(call, self._trace, self._wider)]
        except NotGated as why:
            reasons.append(str(why))
            return []

    def _parts(self, block: ResidualBlock, there: list[str], reasons: list[str]) -> list[Section]:
        sections = []
        for branch in block.branches:
            try:
                section = branch_section(branch, block, self._trace, self._wider)
            except NotGated as why:
                reasons.append(str(why))
                continue
            names = [link.name for link in section.links]
            if any(
                _inside(name, names) or _inside(link, [name]) for name in there for link in names
            ):
                reasons.append("its branch holds other sections")
            elif not any(_is_ignored(k.name, k.module, self._ignored) for k in section.links):
                sections.append(section)
        return sections


def _that_run(
    choices: Sequence[_Choice],
    left_out: dict[str, str],
    failing: Callable[[list[Section]], str | None],
) -> list[Section]:
    """The sections with which the model runs.

    Args:
        choices: of the blocks.
        left_out: where those without a section are put, with the reason.
        failing: tells why a model does not run with some sections gated.
    """
    first = [section for choice in choices for section in choice.candidates[0]]
    if not first or failing(first) is None:
        return first
    running = []
    for kind in dict.fromkeys(choice.kind for choice in choices):
        alike = [choice for choice in choices if choice.kind is kind]
        reasons = []
        for number in range(max(len(choice.candidates) for choice in alike)):
            tried = [s for c in alike for s in (c.candidates[number:] or [[]])[0]]
            reasons.append(failing(tried))
            if reasons[-1] is None:
                running += tried
                break
        else:
            left_out |= {choice.name: reasons[0] for choice in alike}
    return running


def _is_ignored(name: str, module: nn.Module, ignored: tuple) -> bool:
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


def _inside(name: str, taken: list[str]) -> bool:
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
