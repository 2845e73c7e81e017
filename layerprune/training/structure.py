"""The content of ``structure.json``: how a network is built, and which of its sections are gone."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerprune._version import __version__
from layerprune.calls import Inputs
from layerprune.info import absent
from layerprune.sections import Section
from layerprune.sections.described import is_well_formed, section_at
from layerprune.training.builders import check_kwargs

__all__ = ["absent", "decoded", "digest", "encoded", "random_inputs", "sections_at", "structure_of"]

SCHEMA = 3
"""Version of the files' content; 1 is read as well."""
LIMIT = 1 << 21
"""Characters of ``structure.json`` at the most."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int32, torch.int64, torch.bool),
    )
}
_MOST_ELEMENTS = 1 << 26
"""Of all inputs together."""
_PLAIN = bool | int | float | str


def structure_of(
    builder: Mapping[str, Any] | None,
    dataset: str | None,
    example_inputs: Inputs | None,
    eliminated: Sequence[str],
    sections: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of ``structure.json``, but for the checksums.

    Args:
        builder: ``name`` and ``kwargs``, see `builders.build_on_meta`; None for a network that no
            builder known here makes.
        dataset: what the network was trained on; None for what is no data set of this package.
        example_inputs: what the network is called with; of tensors only shape and dtype stay.
        eliminated: names of the sections that are gone.
        sections: of `LayerPruner.structure`; empty for a network that was not pruned.

    Raises:
        TypeError: if an input is neither a tensor nor a plain value.
        ValueError: if an input's dtype is not one of those that can be written down.
    """
    return {
        "schema": SCHEMA,
        "layerprune": __version__,
        "builder": None if builder is None else dict(builder),
        "dataset": dataset,
        "inputs": _described(example_inputs),
        "eliminated": list(eliminated),
        "sections": [dict(section) for section in sections],
    }


def _described(inputs: Inputs | None) -> list | dict | None:
    if inputs is None:
        return None
    if isinstance(inputs, Mapping):
        return {key: _described_one(value) for key, value in inputs.items()}
    several = inputs if isinstance(inputs, list | tuple) else (inputs,)
    return [_described_one(value) for value in several]


def _described_one(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise ValueError(f"example_inputs of {dtype} cannot be described: leave them out")
        return {"shape": list(value.shape), "dtype": dtype}
    if isinstance(value, _PLAIN | None):
        return {"value": value}
    raise TypeError(
        "example_inputs must be tensors and plain values to be described, got "
        f"{type(value).__name__}: leave them out"
    )


def random_inputs(described: list | dict, generator: torch.Generator) -> Inputs:
    """Inputs of the described shapes: standard normal, and 0 or 1 where they are whole numbers."""

    def made(entry: Mapping[str, Any]) -> Any:
        if "value" in entry:
            return entry["value"]
        dtype = _DTYPES[entry["dtype"]]
        if dtype.is_floating_point:
            return torch.randn(entry["shape"], generator=generator).to(dtype)
        return torch.randint(0, 2, entry["shape"], generator=generator).to(dtype)

    if isinstance(described, dict):
        return {key: made(entry) for key, entry in described.items()}
    return [made(entry) for entry in described]


def sections_at(
    model: nn.Module, names: Iterable[str], structure: Mapping[str, Any]
) -> dict[str, Section]:
    """Sections of a dense model, found by name and kind and not by running the model.

    Raises:
        ValueError: there is no section of such a name.
    """
    modules = dict(model.named_modules())
    parts = {part["name"]: part for part in structure["sections"]}
    found = {name: section_at(name, modules, parts.get(name, {})) for name in names}
    for name, section in found.items():
        if section is None:
            raise ValueError(f"{reprlib.repr(name)} is no section of this model")
    return found


def digest(structure: Mapping[str, Any]) -> str:
    """The SHA-256 of the content, but for its own checksum."""
    sums = {name: sum_ for name, sum_ in structure["checksums"].items() if name != "structure"}
    text = json.dumps({**structure, "checksums": sums}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encoded(structure: Mapping[str, Any], checksums: Mapping[str, str]) -> str:
    """The text of ``structure.json``.

    Args:
        structure: of `structure_of`.
        checksums: SHA-256 of the other files, by name.

    Raises:
        ValueError: if it would not be read back.
    """
    content = {**structure, "checksums": dict(checksums)}
    content["checksums"]["structure"] = digest(content)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if len(text) > LIMIT:
        raise ValueError(f"the network's structure takes more than {LIMIT} characters")
    return text


def decoded(found: Any) -> dict[str, Any]:
    """Checks the value of ``structure.json``; that of an earlier schema comes back as one of this.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    schema = found.get("schema") if isinstance(found, dict) else None
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ValueError(
            f"it has schema version {reprlib.repr(schema)}, this version of layerprune reads 1 to "
            f"{SCHEMA}"
        )
    try:
        if schema == 1:
            found = _of_schema_1(found)
        elif found["checksums"]["structure"] != digest(found):
            raise ValueError("it is damaged: its content is not what its checksum was made of")
        if schema == 2:
            found = _of_schema_2(found)
        damaged = not _well_formed(found)
    except (AttributeError, LookupError, TypeError, RecursionError):
        damaged = True
    if damaged:
        raise ValueError("it is damaged: it lacks the network's builder or its sections")
    if found["builder"] is not None:
        check_kwargs(found["builder"]["name"], found["builder"]["kwargs"])
    return found


def _of_schema_1(found: dict[str, Any]) -> dict[str, Any]:
    kwargs = found["builder"]["kwargs"]
    shape = [2, kwargs["in_channels"], kwargs["image_size"], kwargs["image_size"]]
    return found | {
        "schema": SCHEMA,
        "inputs": [{"shape": shape, "dtype": "float32"}],
        "sections": [{**part, "several_arguments": False} for part in found["sections"]],
        "checksums": {},
    }


def _of_schema_2(found: dict[str, Any]) -> dict[str, Any]:
    """There, blocks counted their branches, which are those of the sections."""
    parts = [
        {**part, "shaped": part["full"]} if "full" in part else part for part in found["sections"]
    ]
    ends: dict[str, list[str]] = {}
    for part in parts:
        if part.get("block"):
            block = part["block"]["name"]
            ends.setdefault(block, []).append(part["links"][-1]["name"].removeprefix(f"{block}."))
    for part in parts:
        block = part.get("block")
        if block:
            known = ends[block["name"]]
            whole = len(known) == block["branches"]
            part["block"] = {**block, "ends": known} if whole else None
    return found | {"schema": SCHEMA, "sections": parts}


def _well_formed(found: dict[str, Any]) -> bool:
    return (
        (found["builder"] is None or {"name", "kwargs"} <= found["builder"].keys())
        and (found["dataset"] is None or isinstance(found["dataset"], str))
        and (found["inputs"] is None or _well_formed_inputs(found["inputs"]))
        and isinstance(found["eliminated"], list)
        and all(isinstance(name, str) for name in found["eliminated"])
        and _different(found["eliminated"])
        and isinstance(found["sections"], list)
        and all(_well_formed_section(part) for part in found["sections"])
        and _different([part["name"] for part in found["sections"]])
        and all(isinstance(value, str) for value in found["checksums"].values())
    )


def _different(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _well_formed_inputs(inputs: Any) -> bool:
    if not isinstance(inputs, list | dict):
        return False
    entries = list(inputs.values()) if isinstance(inputs, dict) else inputs
    tensors = [entry for entry in entries if "value" not in entry.keys()]
    return (
        all(isinstance(e.get("value"), _PLAIN | None) for e in entries)
        and all(entry["dtype"] in _DTYPES for entry in tensors)
        and all(isinstance(e["shape"], list) and len(e["shape"]) < 10 for e in tensors)
        and all(type(size) is int and size > 0 for entry in tensors for size in entry["shape"])
        and sum(math.prod(entry["shape"]) for entry in tensors) <= _MOST_ELEMENTS
    )


def _well_formed_section(part: dict[str, Any]) -> bool:
    return (
        is_well_formed(part)
        and part["status"] in ("open", "settled", "eliminated")
        and type(part["theta"]) in (int, float)
        and 0.0 <= part["theta"] <= 1.0
    )
