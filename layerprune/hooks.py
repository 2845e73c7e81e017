"""A model's forward hook that neither copies nor compilers take along.

Imported when the first one is made: importing the compiler takes its time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Hook:
    """A forward hook that a copy or a pickle of the model does not take along.

    Args:
        call: what it calls; None for nothing.
    """

    def __init__(self, call: Callable[..., object] | None = None) -> None:
        self._call = call

    @torch.compiler.disable(reason="the pruner draws gates, and tests, outside compiled code")
    def __call__(self, *args: object) -> object:
        """What the hooked function returns."""
        return None if self._call is None else self._call(*args)

    def __deepcopy__(self, memo: dict) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple:
        return Hook, ()
