"""Finds the sections of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from layerprune.calls import Inputs
from layerprune.sections.base import Section
from layerprune.sections.known import adapter_of
from layerprune.sections.recording import record
from layerprune.sections.search import Search, is_ignored, is_inside, that_run
from layerprune.sections.trial import failure

Ignored = Iterable[nn.Module | type[nn.Module] | str]


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

    Two forwards in evaluation mode, with more and with fewer rows, show what is added to what: of
    fake tensors, which have no values, and of real ones where that does not run. A block
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
    recording = record(model, example_inputs)
    search = Search(model, ignored, recording, [section.name for section in known])
    choices = search.residual_choices()
    if not (known or choices):
        choices = search.plain_choices()
    found = Survey(known, search.left_out)
    found.sections += that_run(choices, found.left_out, lambda tried: failure(recording, tried))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found.sections.sort(key=lambda section: order[section.name])
    return found


def _known_sections(model: nn.Module, ignored: tuple) -> list[Section]:
    sections: list[Section] = []
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is None or not name or is_ignored(name, module, ignored):
            continue
        if not is_inside(name, [section.name for section in sections]):
            sections.append(Section(name, module, adapter))
    return sections
