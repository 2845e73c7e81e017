"""What stands in the places of removed modules that others go on calling."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PassThrough(nn.Module):
    """Returns its input: what stands for a removed module that was called with more than that.

    Args:
        key: where the input is given: a position, or a name.
        place: where it stands in the result, if that is a tuple.
        width: elements of that tuple, of which the others are None; None for a bare tensor.
    """

    def __init__(self, key: int | str = 0, place: int = 0, width: int | None = None) -> None:
        super().__init__()
        self.key, self.place, self.width = key, place, width

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
        """Returns its input, or a tuple that holds it."""
        x = args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        return in_place(self.value(x), self.place, self.width)

    def value(self, x: Tensor) -> Tensor:
        """What is returned for an input."""
        return x

    def extra_repr(self) -> str:
        """Names what the module is, in `print(model)`."""
        return "" if self.width is None else f"element {self.place} of {self.width}"


class Nothing(PassThrough):
    """Returns zero: what stands for the last module of a removed branch.

    Args:
        key: as in `PassThrough`.
        place: as in `PassThrough`.
        width: as in `PassThrough`.
        shaped: whether the zeros have the input's shape; else it is a single one.
    """

    def __init__(
        self, key: int | str = 0, place: int = 0, width: int | None = None, shaped: bool = False
    ) -> None:
        super().__init__(key, place, width)
        self.shaped = shaped

    def value(self, x: Tensor) -> Tensor:
        """Zero, or zeros."""
        return nothing(x, self.shaped)


def nothing(x: Tensor, shaped: bool) -> Tensor:
    """Zero, as what a branch adds; a single one where whoever adds it can broadcast."""
    return torch.zeros_like(x) if shaped else x.new_zeros(())


def in_place(value: Tensor, place: int, width: int | None) -> Tensor | tuple[Tensor | None, ...]:
    """A value alone, or at its place in a tuple of Nones."""
    if width is None:
        return value
    return tuple(value if index == place else None for index in range(width))
