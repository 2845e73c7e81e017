"""Checks values that a person wrote (YAML, flags) against the annotations of a dataclass."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from layerprune.brief import brief

__all__ = ["coerced"]

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    types.NoneType: "null",
}


def coerced(cls: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values for fields of a dataclass, of the annotated types.

    Whole numbers become floats where a float is due, and so does text like ``1e-4``, which YAML
    does not take for a number; lists become tuples. Nothing else is converted.

    Args:
        cls: the dataclass.
        values: by field name; fields may be missing.
        what: what the values belong to, for the message.

    Raises:
        ValueError: an unknown field, or a value of another type.
    """
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise ValueError(
            f"{what} has no setting {', '.join(unknown)}; the settings are {', '.join(known)}"
        )
    result = {}
    for name, value in values.items():
        try:
            result[name] = _fit(value, hints[name])
        except TypeError:
            raise ValueError(
                f"{name} of {what} must be {_words(hints[name])}, got {brief(value)}"
            ) from None
    return result


def _fit(value: Any, hint: Any) -> Any:
    """The value as the annotation wants it; TypeError if it does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _fit(value, option)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_fit(item, arguments[0]) for item in value)
    elif origin is dict and isinstance(value, Mapping):
        return {_fit(key, str): item for key, item in value.items()}
    elif hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint in _WORDS and type(value) is hint:
        return value
    raise TypeError


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in arguments)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is tuple:
        return f"a list, each element {_words(arguments[0])}"
    return _WORDS[origin or hint]
