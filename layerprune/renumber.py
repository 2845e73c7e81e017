"""Renumbering: the places that eliminated sections left empty go, and the ones behind move up."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from layerprune.sections.opaque import PassThrough


def renumber(model: nn.Module, eliminated: Iterable[str]) -> nn.Module:
    """Takes eliminated sections out of the containers that number their children.

    Of each ``nn.Sequential`` and ``nn.ModuleList`` whose children are called 0, 1, 2, ..., those go
    that an elimination left without any computation, and the others close up. Containers stay the
    objects that they are, with their hooks; an ``nn.Identity`` that is no eliminated section's
    stays, and so does a section's shortcut or activation.

    Only names change. An optimizer goes on as it is, except that the names which it was given in
    place of bare parameters are the old ones; a copy of the model, such as an averaged one, keeps
    its names unless it is renumbered too. The model must not go through a container by number: a
    forward that combines ``layers[3]`` with a fourth something else would combine others now.

    Args:
        model: a model that has lost sections, changed in place.
        eliminated: their names, as in `StepReport.eliminated` or `eliminate_sections`.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no module of such a name.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(eliminated)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(
            f"the model has no module {unknown[0]!r}: give the names from before any renumbering, "
            "and renumber once"
        )
    # A section used in several places left the same remainder in each.
    empty = {modules[name] for name in names if type(modules[name]) in (nn.Identity, PassThrough)}
    for container in set(modules.values()):
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        children = list(container._modules.items())
        if [key for key, _ in children] != [str(index) for index in range(len(children))]:
            continue
        for index in reversed(range(len(children))):
            if children[index][1] in empty:
                del container[index]
    return model
