"""The argument check that all networks share."""

from __future__ import annotations


def check_at_least(model: str, **least: tuple[int, int]) -> None:
    """Refuse an argument below its least value.

    Args:
        model: The network's name, for the message.
        **least: ``name=(value, least value)``.

    Raises:
        ValueError: A value is below its least value.
    """
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{model} needs {name} of at least {minimum}, got {value}")
