"""Values that somebody else wrote, in so few words that a message can hold them."""

from __future__ import annotations

import reprlib
from typing import Any

_LENGTH = 120


class _Brief(reprlib.Repr):
    """Shows plain values and the outermost of plain containers.

    Of anything else the type alone: its own repr may be as long as it likes, and that of containers
    which hold each other twice doubles with every level.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3

    def repr_instance(self, value: Any, level: int) -> str:
        if value is None or isinstance(value, bool | float):
            return repr(value)
        return f"<{type(value).__name__}>"


_SHOWN = _Brief()


def brief(value: Any) -> str:
    """A value in one line of at most 120 characters, whatever it is."""
    text = " ".join(_SHOWN.repr(value).split())
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."
