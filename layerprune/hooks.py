"""A model's forward hook that neither copies nor compilers take along.

Imported when the first one is made: importing the compiler takes its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Gone:
    """What remains of a hook in a copy of the model."""

    def __call__(self, *args: object) -> None:
        """Does nothing."""


class Hook:
    """A forward hook that a copy or a pickle of the model does not take along.

    Args:
        call: what it calls.
    """

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    @torch.compiler.disable(reason="the pruner draws gates, and tests, outside compiled code")
    def __call__(self, *args: object) -> object:
        """What the hooked function returns."""
        return self._call(*args)

    def __deepcopy__(self, memo: dict) -> Gone:
        return Gone()

    def __reduce__(self) -> tuple:
        return Gone, ()
