"""Sections from their descriptions, as `Section.description` gives them, without a forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from layerprune.sections.base import Section
from layerprune.sections.branch import Block, BranchSection, Link
from layerprune.sections.known import adapter_of
from layerprune.sections.opaque import OpaqueAdapter

_MOST = 64
"""Links of a branch, branches of a block and elements of a result at the most."""


def section_at(
    name: str, modules: Mapping[str, nn.Module], part: Mapping[str, Any]
) -> Section | None:
    """The section of a name, or None if there is none.

    Args:
        name: the section's name.
        modules: of a dense model, by qualified name.
        part: its description, which `is_well_formed`; empty for a section of a known kind.
    """
    if not name or name not in modules:
        return None
    kind = part.get("kind")
    if kind == "branch":
        return _branch_at(name, modules, part)
    adapter = adapter_of(modules[name])
    if adapter is None and kind == OpaqueAdapter.kind:
        width = part.get("width")
        adapter = OpaqueAdapter(frozenset(), part["several_arguments"], width=width)
    return None if adapter is None else Section(name, modules[name], adapter)


def _branch_at(
    name: str, modules: Mapping[str, nn.Module], part: Mapping[str, Any]
) -> Section | None:
    block = part["block"]
    called = [*part["links"], *([] if block is None else [block])]
    if any(not each["name"] or each["name"] not in modules for each in called):
        return None
    links = tuple(_link(each, modules) for each in part["links"])
    if name not in [link.name for link in links]:
        return None
    block = block and Block(_link(block, modules), tuple(block["ends"]))
    return BranchSection(name, modules[name], None, links, part["shaped"], block)


def _link(part: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Link:
    return Link(
        part["name"],
        modules[part["name"]],
        (part["key"],),
        part["place"],
        part["width"],
        part["several_arguments"],
    )


def is_well_formed(part: Mapping[str, Any]) -> bool:
    """Whether a description that was read from a file has what its kind needs.

    Raises:
        KeyError: it lacks something, as may AttributeError and TypeError tell.
    """
    if not all(isinstance(part[key], str) for key in ("name", "kind")):
        return False
    if part["kind"] != "branch":
        several = isinstance(part["several_arguments"], bool)
        return several and _is_count(part.get("width"), optional=True)
    block, links = part["block"], part["links"]
    return (
        isinstance(links, list)
        and 0 < len(links) <= _MOST
        and all(map(_is_link, links))
        and len({link["name"] for link in links}) == len(links)
        and isinstance(part["shaped"], bool)
        and (block is None or (_is_link(block) and _are_names(block["ends"])))
    )


def _are_names(part: object) -> bool:
    return (
        isinstance(part, list)
        and 0 < len(part) <= _MOST
        and all(isinstance(name, str) for name in part)
    )


def _is_link(part: Mapping[str, Any]) -> bool:
    return (
        isinstance(part["name"], str)
        and (isinstance(part["key"], str) or _is_count(part["key"], least=0))
        and _is_count(part["place"], least=0)
        and _is_count(part["width"], optional=True)
        and (part["width"] is None or part["place"] < part["width"])
        and isinstance(part["several_arguments"], bool)
    )


def _is_count(value: object, least: int = 1, optional: bool = False) -> bool:
    return (optional and value is None) or (type(value) is int and least <= value <= _MOST)
