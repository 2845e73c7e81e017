"""Compaction: eliminated sections leave the model, and their parameters leave the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerprune.caches import number_caches
from layerprune.calls import Inputs, as_call, evaluating
from layerprune.optimizers import forget
from layerprune.sections import Section, find_sections
from layerprune.sections.known import adapter_of, forward_order
from layerprune.sections.removal import emptied_by, places, remove, remove_emptied

_NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_KEEPS_SIGN = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


def branch_keys(model: nn.Module, sections: Sequence[Section]) -> set[str]:
    """Keys of a model's `state_dict` that go with sections, wherever these stand in it."""
    left = [pair for section in sections for pair in section.branch_tensors()]
    left += [(module, list(module.state_dict())) for module in emptied_by(sections)]
    gone = {id(module): keys for module, keys in left}
    return {
        f"{name}.{key}"
        for name, module in model.named_modules(remove_duplicate=False)
        for key in gone.get(id(module), ())
    }


def remove_sections(
    model: nn.Module, sections: Sequence[Section], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Removes sections from a model and what they leave unused from its optimizers.

    What remains keeps its names, its parameters and their optimizer state; parameter groups are
    edited in place and keep their number.

    Args:
        model: the model, changed in place.
        sections: sections of that model, gated or not.
        optimizers: those to shrink along, which `optimizers.check_optimizer` accepts; they may hold
            none of the parameters any more.
    """
    before = {id(p) for p in model.parameters()}
    remove(model, sections, lambda module: _nonnegative_input(model, places(model, module)))
    remove_emptied(model, sections)
    number_caches(model)
    gone = before - {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        forget(optimizer, gone)


def eliminate_sections(model: nn.Module, names: Iterable[str], example_inputs: Inputs) -> nn.Module:
    """Gives a dense model the structure of a pruned one: how a checkpoint is rebuilt.

    Args:
        model: a dense model, changed in place.
        names: names of the sections to remove.
        example_inputs: what the model is called with.

    Returns:
        The same model.

    Raises:
        ValueError: if a name is no section of the model.
    """
    found = {section.name: section for section in find_sections(model, example_inputs)}
    remove_sections(model, [_named(found, name) for name in names])
    return model


@torch.no_grad()
def verify(gated: nn.Module, compacted: nn.Module, batches: Iterable[Inputs]) -> float:
    """Largest absolute difference between two models' outputs in evaluation mode.

    Args:
        gated: a model whose gates are at 0 or 1.
        compacted: the model without the sections whose gates are at 0.
        batches: inputs to compare on.

    Returns:
        The difference; 0.0 means equal bit for bit (up to the sign of zero).

    Raises:
        ValueError: without any batch, or if the outputs differ in number or shape.
    """
    worst, compared = 0.0, False
    with evaluating(gated), evaluating(compacted):
        for inputs in batches:
            args, kwargs = as_call(inputs)
            left, right = (
                tree_leaves(gated(*args, **kwargs)),
                tree_leaves(compacted(*args, **kwargs)),
            )
            left = [leaf for leaf in left if isinstance(leaf, Tensor)]
            right = [leaf for leaf in right if isinstance(leaf, Tensor)]
            if [leaf.shape for leaf in left] != [leaf.shape for leaf in right]:
                raise ValueError("the two models return outputs of different shapes")
            for a, b in zip(left, right, strict=True):
                compared = True
                if a.numel() and not torch.equal(a, b):
                    worst = max(
                        worst, float((a.double() - b.double()).abs().nan_to_num(torch.inf).max())
                    )
    if not compared:
        raise ValueError(
            "nothing was compared: batches is empty, or the models return no tensors in containers "
            "that torch knows"
        )
    return worst


def _named(sections: dict[str, Section], name: str) -> Section:
    if name not in sections:
        raise ValueError(f"{name!r} is no section of this model; it has {sorted(sections)}")
    return sections[name]


def _nonnegative_input(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether what comes before a module, as far as that is known, puts out no negative value.

    Args:
        model: the model.
        names: of all places of the module.
    """
    return all(_nonnegative_before(model, name) for name in names)


def _nonnegative_before(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    parent = model.get_submodule(path)
    order = forward_order(parent)
    if key not in order:
        return False
    for earlier in reversed(order[: order.index(key)]):
        module = parent.get_submodule(earlier)
        if type(module) not in _KEEPS_SIGN:
            return _nonnegative_output(module)
    return bool(path) and _nonnegative_before(model, path)


def _nonnegative_output(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:
        last = [child for child in module if type(child) not in _KEEPS_SIGN]
        return bool(last) and _nonnegative_output(last[-1])
    adapter = adapter_of(module)
    return type(module) in _NEVER_NEGATIVE or (adapter is not None and adapter.nonnegative(module))
