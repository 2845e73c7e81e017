"""Finds the sections of a model."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from layerprune.cost import Inputs, batch_size_of, batch_tensors, dry_run
from layerprune.sections.base import Adapter, ResidualAdapter, Section
from layerprune.sections.opaque import OpaqueAdapter
from layerprune.sections.residual import GatedResidual

Ignored = Iterable[nn.Module | type[nn.Module] | str]


@functools.cache
def _known_blocks() -> dict[type[nn.Module], Adapter]:
    try:
        from layerprune.sections.torchvision import ADAPTERS
    except ImportError:
        return {}
    return {block: a for a in ADAPTERS for block in (a.original, a.twin)}


@functools.cache
def _known_networks() -> dict[type[nn.Module], tuple[str, ...]]:
    try:
        from layerprune.sections.torchvision import FORWARD_ORDER
    except ImportError:
        return {}
    return FORWARD_ORDER


def forward_order(module: nn.Module) -> tuple[str, ...]:
    """The children that a module runs one on the output of another; none where that is not known.

    ``nn.Sequential`` and known networks, by their exact class.
    """
    if type(module) is nn.Sequential:
        return tuple(module._modules)
    return _known_networks().get(type(module), ())


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a `GatedResidual` or a known block, gated already or not."""
    if isinstance(module, GatedResidual):
        return ResidualAdapter()
    return _known_blocks().get(type(module))


@dataclass(frozen=True)
class _Call:
    """Shapes of one module's call: by position or name, and of its result.

    Arguments that are no tensors have no shape, and count.
    """

    arguments: dict[int | str, tuple[int, ...]]
    result: tuple[int, ...] | None
    count: int


def find_sections(model: nn.Module, example_inputs: Inputs, ignored: Ignored = ()) -> list[Section]:
    """Finds what can be gated: `GatedResidual`s, known blocks, and opaque blocks.

    An opaque block is an element of a `Sequential` or `ModuleList`, made of several modules, with
    weights, whose output has its input's shape. Which of its arguments carry the batch is found by
    two forwards of fake tensors, with B and B + 1 rows.

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
    ignored = (ignored,) if isinstance(ignored, str) else tuple(ignored)
    sections: list[Section] = []
    taken: list[str] = []
    seen: set[nn.Module] = set()
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if (
            adapter is None
            or not name
            or _is_ignored(name, module, ignored)
            or _inside(name, taken)
        ):
            continue
        seen.add(module)
        taken.append(name)
        sections.append(Section(name, module, adapter))
    calls = _recorded_calls(model, example_inputs)
    candidates = [
        (name, module)
        for name, module in _stack_elements(model)
        if module not in seen and not _is_ignored(name, module, ignored)
    ]
    # A block before a plain sequence of blocks: the sequence is more likely a stage.
    candidates.sort(key=lambda pair: isinstance(pair[1], nn.Sequential))
    for name, module in candidates:
        adapter = _opaque_adapter(module, calls.get(name, []))
        overlapping = _inside(name, taken) or any(other.startswith(f"{name}.") for other in taken)
        if adapter is not None and not overlapping:
            taken.append(name)
            sections.append(Section(name, module, adapter))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(sections, key=lambda section: order[section.name])


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
            owner = model.get_submodule(name.rpartition(".")[0])
            for key, child in module.named_children():
                if key == "0" and isinstance(owner, (nn.TransformerEncoder, nn.TransformerDecoder)):
                    continue  # torch's own forward looks into the first layer
                composite = next(child.children(), None) is not None
                if composite and any(p.dim() >= 2 for p in child.parameters()):
                    elements.append((f"{name}.{key}" if name else key, child))
    return elements


def _recorded_calls(model: nn.Module, inputs: Inputs) -> dict[str, list[_Call]]:
    """Calls of every module with B and with B + 1 rows, in this order."""
    calls: dict[str, list[_Call]] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
            given = dict(enumerate(args)) | kwargs
            shapes = {k: tuple(v.shape) for k, v in given.items() if isinstance(v, Tensor)}
            out = tuple(result.shape) if isinstance(result, Tensor) else None
            calls.setdefault(name, []).append(_Call(shapes, out, len(given)))

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        _run_twice(model, inputs, calls)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _run_twice(model: nn.Module, inputs: Inputs, calls: dict[str, list[_Call]]) -> None:
    """Runs the model with B and B + 1 rows, resizing its inputs in the first way that works."""
    rows = batch_size_of(inputs)
    first, *others = batch_tensors(inputs)
    error: Exception | None = None
    # A mask, say, may have as many rows as the batch without being one: leave out none, one, two,
    # ...
    for left_out in range(len(others) + 1):
        for kept in itertools.combinations(others, len(others) - left_out):
            calls.clear()
            try:
                for size in (rows, rows + 1):
                    dry_run(model, inputs, size, (first, *kept))
            except Exception as failure:
                error = error or failure
            else:
                return
    raise ValueError(
        f"the model does not run with example_inputs of {rows} rows: {error}. Give inputs "
        "as the training "
        "loop does, with the batch in the first dimension."
    ) from error


def _opaque_adapter(module: nn.Module, calls: list[_Call]) -> OpaqueAdapter | None:
    """The adapter, or None where the module's calls do not show that a gate would be right."""
    if len(calls) != 2:
        return None
    first, second = calls
    if first.result is None or first.arguments.get(0) != first.result:
        return None
    batched = set()
    for key, shape in first.arguments.items():
        other = second.arguments.get(key)
        if other == shape:
            continue
        if other is None or not shape or other != (shape[0] + 1, *shape[1:]):
            return None
        batched.add(key)
    if 0 not in batched or second.result != second.arguments[0]:
        return None
    return OpaqueAdapter(frozenset(batched), first.count > 1, frozenset(first.arguments) - batched)
