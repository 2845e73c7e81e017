"""Renumbering: the places that eliminated sections left empty go, and the ones behind move up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from layerprune.caches import number_caches
from layerprune.calls import Inputs
from layerprune.depth import misfits, rename_eliminated, shrink_config
from layerprune.renumber_checks import are_alike, evaluated, undone_by_errors
from layerprune.sections.placeholders import PassThrough


def renumber(
    model: nn.Module, eliminated: Iterable[str], example_inputs: Inputs | None = None
) -> nn.Module:
    """Takes eliminated sections out of the containers that number their children.

    Of each ``nn.Sequential`` and ``nn.ModuleList`` whose children are called 0, 1, 2, ..., those go
    that an elimination left without any computation, and the others close up. Containers stay the
    objects that they are, with their hooks; an ``nn.Identity`` that is no eliminated section's
    stays, and so does a section's shortcut or activation.

    Only names change. An optimizer goes on as it is, except that the names which it was given in
    place of bare parameters are the old ones; a copy of the model, such as an averaged one, keeps
    its names unless it is renumbered too. A configuration of transformers gets the new depth, so
    that it builds a model with these names.

    Args:
        model: a model that has lost sections, changed in place.
        eliminated: their names, as in `StepReport.eliminated` or `eliminate_sections`.
        example_inputs: what the model is called with, to see whether it computes the same as
            before: one that goes through a container by number, and combines ``layers[3]`` with a
            fourth something else, does not. Without them that is the caller's to know.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no module of such a name; if it computes something else with
            ``example_inputs``, or its configuration cannot say which layers are left. The model is
            as before then.
    """
    with undone_by_errors(model):
        if example_inputs is None:
            return _close_up(model, eliminated)
        try:
            before, again = (evaluated(model, example_inputs) for _ in range(2))
        except Exception as error:
            raise ValueError(
                f"example_inputs do not show what renumbering makes of the model ({error}): call "
                "layerprune.renumber without them if you know"
            ) from error
        _close_up(model, eliminated)
        try:
            same = are_alike(before, again, evaluated(model, example_inputs))
        except Exception as error:
            raise _not_renumbered(f"it would not run ({error})") from error
        if not same:
            raise _not_renumbered(
                "it would compute something else, as where a forward goes through a container by "
                "number, or a layer's number is part of what it computes"
            )
    return model


def _not_renumbered(why: str) -> ValueError:
    return ValueError(
        f"the model cannot be renumbered: {why.partition(chr(10))[0]}. Leave the places of what "
        "was eliminated as they are"
    )


def _close_up(model: nn.Module, eliminated: Iterable[str]) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    # A section used in several places left the same remainder in each.
    empty = {_left_of(name, modules) for name in eliminated}
    told = not misfits(model)
    shrunk = {}
    for path, container in modules.items():
        if container in shrunk or not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        children = list(container._modules.items())
        if [key for key, _ in children] != [str(index) for index in range(len(children))]:
            continue
        kept = [index for index, (_, child) in enumerate(children) if child not in empty]
        if len(kept) < len(children):
            shrunk[container] = kept
            shrink_config(model, path, kept, len(children))
    for container, kept in shrunk.items():
        for index in reversed(range(len(container))):
            if index not in kept:
                del container[index]
    rename_eliminated(model, modules)
    number_caches(model)  # the types of fewer layers are a smaller cache's
    if told and shrunk and (wrong := misfits(model)):
        raise _not_renumbered(f"{type(model.config).__name__} would build another one ({wrong[0]})")
    return model


def _left_of(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """What stands in an eliminated section's place, if it does nothing.

    A branch's place may have gone with its block, which has nothing else left.
    """
    place = name
    while place not in modules and "." in place:
        place = place.rpartition(".")[0]
    module = modules.get(place)
    if place != name and not isinstance(module, nn.Identity | PassThrough):
        module = None
    if module is None:
        raise ValueError(
            f"the model has no module {name!r}: give the names from before any renumbering, "
            "and renumber once"
        )
    return module if type(module) in (nn.Identity, PassThrough) else None
