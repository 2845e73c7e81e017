"""What a study's YAML file may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from study.methods import METHODS


class StudyError(ValueError):
    """A study or an option is not as it must be; the message says what and the remedy."""


_KEYS = {"seeds", "methods", "equal_flops", "tasks", "variations", "reinsertions"}
_TASK_KEYS = {"recipe", "held_out", "seeds", "methods", "equal_flops"}


def check_study(path: Path, given: Any) -> None:
    """Refuses a study that lacks something, or has what nobody reads."""

    def check(is_right: bool, what: str) -> None:
        if not is_right:
            raise StudyError(f"{path}: {what}")

    check(isinstance(given, dict), "a study is a mapping")
    missing = {"seeds", "methods", "tasks"} - set(given)
    check(not missing, f"it lacks {', '.join(sorted(missing))}")
    check(given.keys() <= _KEYS, f"unknown {', '.join(sorted(map(str, given.keys() - _KEYS)))}")
    check(isinstance(given["tasks"], dict), "tasks is a mapping from names to tasks")
    for name, task in given["tasks"].items():
        check(isinstance(task, dict), f"task {name} is a mapping")
        missing = {"recipe", "held_out"} - set(task)
        check(not missing, f"task {name} lacks {', '.join(sorted(missing))}")
        unknown = task.keys() - _TASK_KEYS
        check(not unknown, f"task {name}: unknown {', '.join(sorted(map(str, unknown)))}")
        whole = settings_of(given, name)
        seeds, held_out = whole["seeds"], whole["held_out"]
        numbers = isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)
        check(bool(numbers), f"task {name}: seeds is a list of at least one number, got {seeds!r}")
        check(
            type(held_out) is int and held_out >= 2,
            f"task {name}: held_out is a number of images of at least 2, got {held_out!r}",
        )
        unknown = set(whole["methods"]) - METHODS.keys()
        check(not unknown, f"unknown method {', '.join(sorted(unknown))}")
        unknown = set(whole.get("equal_flops", ())) - set(whole["methods"])
        check(not unknown, f"task {name}: equal_flops are methods of it, got {unknown}")
    for key in ("variations", "reinsertions"):
        unknown = set(given.get(key, ())) - given["tasks"].keys()
        check(not unknown, f"{key} of unknown tasks: {', '.join(sorted(unknown))}")


def settings_of(study: dict, name: str) -> dict:
    """What a task says, and what it does not, the study."""
    return study | study["tasks"][name]
