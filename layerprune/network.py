"""A model and its average: their sections are gated, and leave, together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from layerprune.compaction import remove_sections
from layerprune.gates import Gate
from layerprune.sections import Section


class Network:
    """What a pruner changes.

    Args:
        model: the model.
        sections: its sections.
        ema: an average of the model, or None. Its sections get the model's gates: in evaluation
            they are open where the model's are.

    Raises:
        TypeError: if ``ema`` is no average.
        ValueError: if it is one of another model.
    """

    def __init__(
        self, model: nn.Module, sections: Sequence[Section], ema: AveragedModel | None
    ) -> None:
        self.model = model
        self._parts = [(model, list(sections))]
        if ema is not None:
            self._parts.append(_averaged(ema, sections))

    def attach(self, gates: Sequence[Gate]) -> None:
        """Gives each section its gate."""
        for _, sections in self._parts:
            for section, gate in zip(sections, gates, strict=True):
                section.adapter.attach(section.module, gate)

    def detach(self, indices: Iterable[int]) -> None:
        """Takes the gates off some sections."""
        chosen = list(indices)
        for _, sections in self._parts:
            for index in chosen:
                sections[index].adapter.detach(sections[index].module)

    def remove(self, indices: Iterable[int], optimizer: Optimizer | None = None) -> None:
        """Removes some sections, without their gates by now; see `remove_sections`."""
        chosen = list(indices)
        for model, sections in self._parts:
            held = optimizer if model is self.model else None
            remove_sections(model, [sections[index] for index in chosen], held)


def _averaged(ema: AveragedModel, sections: Sequence[Section]) -> tuple[nn.Module, list[Section]]:
    if not isinstance(ema, AveragedModel):
        raise TypeError(
            "ema must be a torch.optim.swa_utils.AveragedModel of the model, got "
            f"{type(ema).__name__}"
        )
    there = dict(ema.module.named_modules(remove_duplicate=False))
    for section in sections:
        if type(there.get(section.name)) is not type(section.module):
            raise ValueError(
                f"ema is an average of another model: it has no section {section.name!r} like the "
                "model's"
            )
    return ema.module, [replace(section, module=there[section.name]) for section in sections]
