"""What a pruner's saved state has to look like, so that nothing of it is taken on trust."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from layerprune.brief import brief
from layerprune.judge import Status
from layerprune.ops.projected_step import STATISTICS

__all__ = ["check_progress", "check_settings"]

Check = Callable[[Any, str], None]
"""Raises ValueError for a value that does not do; the text is its place in the state."""

_MOST, _LAST_SEED = 1 << 62, (1 << 63) - 1
_DECISIONS = ("eliminated", "settled", "kept", "closed", "rounded-off", "rounded-on")
_REASONS = ("test", "rounding", "attraction")
# Powers of 2 are made of these.
_MOST_ATTEMPTS, _MOST_SETTLINGS = 1000, 64
_PLAIN = bool | int | float | str | None


def check_settings(state: Any) -> None:
    """Checks what says which run a state is of.

    Raises:
        ValueError: if a value is missing or of another kind.
    """
    if not isinstance(state, Mapping):
        raise _misfit(state, "all of it")
    for name, check in {
        "names": _several(_of_kind(str)),
        "total_steps": _whole(),
        "penalty": _of_kind(Tensor),
        "measured": _optional(_of_kind(bool)),
        "config": _mapping(_of_kind(str), _of_kind(_PLAIN)),
    }.items():
        check(state.get(name), name)


def check_progress(state: Mapping[str, Any]) -> None:
    """Checks all else in a state, of which `check_settings` has been checked.

    Raises:
        ValueError: if a value is missing, or cannot be that of such a run.
    """
    sections = state["names"]
    count = len(sections)
    index = _whole(high=count - 1)
    share = _tensor([count], torch.float32, within=(0, 1))
    measurement = _fields(mean=_real, variance=_real, third=_real, rows=_whole())
    test = _fields(
        measurements=_mapping(index, _several(measurement)),
        attempts=_mapping(index, _whole(high=_MOST_ATTEMPTS)),
    )
    checks = {
        "step_count": _whole(),
        "learning_since": _optional(_whole()),
        "status": _several(_one_of(get_args(Status)), count),
        "bank": _fields(
            theta=share,
            probe_rate=share,
            seed=_whole(high=_LAST_SEED),
            draw_number=_whole(),
            widest=_whole(),
        ),
        "judge": _fields(
            test=test,
            current=_optional(index),
            piloting=_of_kind(bool),
            newest=_optional(measurement),
            next_pilot=_whole(),
            rounding_batches=_whole(),
            turn=_several(_whole(), count),
            due=_several(_whole(), count),
            settlings=_several(_whole(high=_MOST_SETTLINGS), count),
        ),
        "evidence": _several(_evidence(count, measurement)),
        "events": _several(
            _fields(
                step=_whole(),
                section=_one_of(sections),
                decision=_one_of(_DECISIONS),
                by=_one_of(_REASONS),
                difference=_optional(_real),
                standard_error=_optional(_real),
                batches=_whole(),
                penalty=_real,
                theta=_real,
            )
        ),
        "ledger": _fields(
            train_flops=_real,
            dense_train_flops=_real,
            test_flops=_real,
            draw_seconds=_real,
            step_seconds=_real,
            test_seconds=_real,
        ),
        "learner": _fields(
            statistics=_tensor([STATISTICS, count], torch.float32),
            in_play=_tensor([count], torch.bool),
        ),
    }
    for name, check in checks.items():
        check(state.get(name), name)


def _evidence(count: int, measurement: Check) -> Check:
    def check(value: Any, place: str) -> None:
        _fields(
            step=_whole(),
            slope=_optional(_tensor([count, None], torch.float32)),
            counted=_optional(_tensor([count, None], torch.bool)),
            section=_optional(_whole(high=count - 1)),
            measurement=_optional(measurement),
            scaled=_of_kind(bool),
            skipped=_of_kind(bool),
        )(value, place)
        shapes = {None if value[n] is None else value[n].shape for n in ("slope", "counted")}
        if len(shapes) > 1 or (value["section"] is None) != (value["measurement"] is None):
            raise _misfit(value, place)

    return check


def _misfit(value: Any, place: str) -> ValueError:
    return ValueError(f"the pruner's state is damaged: {place} is {brief(value)}")


def _holds(condition: Callable[[Any], bool]) -> Check:
    def check(value: Any, place: str) -> None:
        if not condition(value):
            raise _misfit(value, place)

    return check


def _of_kind(kind: Any) -> Check:
    return _holds(lambda value: isinstance(value, kind))


def _one_of(options: Any) -> Check:
    return _holds(lambda value: isinstance(value, str) and value in options)


def _whole(high: int = _MOST) -> Check:
    return _holds(lambda value: type(value) is int and 0 <= value <= high)


_real = _holds(lambda value: type(value) is float or type(value) is int and abs(value) <= _MOST)


def _optional(check: Check) -> Check:
    return lambda value, place: None if value is None else check(value, place)


def _several(check: Check, count: int | None = None) -> Check:
    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, list) or count not in (None, len(value)):
            raise _misfit(value, place)
        for number, entry in enumerate(value):
            check(entry, f"{place}[{number}]")

    return check_all


def _mapping(check_key: Check, check_value: Check) -> Check:
    def check(value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            raise _misfit(value, place)
        for key, entry in value.items():
            check_key(key, f"a key of {place}")
            check_value(entry, f"{place}[{brief(key)}]")

    return check


def _fields(**checks: Check) -> Check:
    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, Mapping) or value.keys() != checks.keys():
            raise _misfit(value, place)
        for name, check in checks.items():
            check(value[name], f"{place}.{name}")

    return check_all


def _tensor(
    shape: list[int | None], dtype: torch.dtype, within: tuple[float, float] = (-math.inf, math.inf)
) -> Check:
    """A tensor of a shape, None standing for any size; where a range is given, of numbers in it."""

    def fits(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.dtype == dtype
            and value.ndim == len(shape)
            and all(size in (None, found) for size, found in zip(shape, value.shape, strict=True))
            and (math.isinf(within[0]) or bool(((value >= within[0]) & (value <= within[1])).all()))
        )

    return _holds(fits)
