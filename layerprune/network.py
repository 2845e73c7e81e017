"""A model and its average: their sections are gated, and leave, together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from layerprune.calls import Inputs
from layerprune.compaction import remove_sections
from layerprune.gates import GateBank
from layerprune.renumber import renumber
from layerprune.sections import Section


class Network:
    """What a pruner changes.

    Args:
        model: the model.
        sections: its sections.
        ema: an average of the model, or None.

    Attributes:
        model: the model.
        sections: its sections; of a removed one the module is what stands in its place.

    Raises:
        TypeError: if ``ema`` is no average.
        ValueError: if it is one of another model.
    """

    def __init__(
        self, model: nn.Module, sections: Sequence[Section], ema: AveragedModel | None
    ) -> None:
        self.model = model
        self.sections = list(sections)
        self._parts = [(model, self.sections)]
        if ema is not None:
            self._parts.append(_averaged(ema, model, sections))

    def attach(self, indices: Iterable[int], bank: GateBank) -> None:
        """Gives some sections their gates, and the average's the gates that follow those."""
        chosen = list(indices)
        for (_, sections), gates in zip(self._parts, (bank.gates, bank.followers), strict=False):
            for index in chosen:
                sections[index].attach(gates[index])

    def detach(self, indices: Iterable[int]) -> None:
        """Takes the gates off some sections."""
        chosen = list(indices)
        for _, sections in self._parts:
            for index in chosen:
                sections[index].detach()

    def remove(self, indices: Iterable[int], optimizers: Sequence[Optimizer] = ()) -> None:
        """Removes some sections, without their gates by now; see `remove_sections`."""
        chosen = list(indices)
        for model, sections in self._parts:
            held = optimizers if model is self.model else ()
            remove_sections(model, [sections[index] for index in chosen], held)
            for index in chosen:  # what left is to be freed
                sections[index] = sections[index].in_model(model)

    def renumber(self, indices: Iterable[int], example_inputs: Inputs) -> None:
        """Closes the gaps that removed sections left; see `renumber.renumber`."""
        chosen = list(indices)
        for model, sections in self._parts:
            # The average computes as the model does.
            checked = example_inputs if model is self.model else None
            renumber(model, [sections[index].name for index in chosen], checked)


def _averaged(
    ema: AveragedModel, model: nn.Module, sections: Sequence[Section]
) -> tuple[nn.Module, list[Section]]:
    """The averaged model and its sections, those of the model itself."""
    if not isinstance(ema, AveragedModel):
        raise TypeError(
            "ema must be a torch.optim.swa_utils.AveragedModel of the model, got "
            f"{type(ema).__name__}"
        )
    # The average pairs parameters by their order, and would not tell.
    found, expected = (
        [(name, parameter.shape) for name, parameter in one.named_parameters()]
        for one in (ema.module, model)
    )
    if found != expected:
        raise ValueError(
            "ema is an average of another model: its parameters' names or shapes are not the "
            "model's. Make it of the model itself, before that is wrapped"
        )
    there = dict(ema.module.named_modules(remove_duplicate=False))
    for section in sections:
        if type(there.get(section.name)) is not type(section.module):
            raise ValueError(
                f"ema is an average of another model: it has no section {section.name!r} like the "
                "model's"
            )
    return ema.module, [section.in_model(ema.module) for section in sections]
