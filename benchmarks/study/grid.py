"""A study: its tasks, methods, seeds and variations, and the cells that they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from layerprune.training import recipe
from layerprune.training.recipe import Recipe
from study.initialisation import SCHEMES
from study.methods import GATED, GIVEN_DEPTH, METHODS
from study.validation import StudyError, check_study, settings_of

FOLDER = Path(__file__).resolve().parent
REFERENCE = "ours"
REINSERTION = "reinsertion"
"""Trains as the reference does, then asks whether what it eliminated would pay."""

EPOCHS, FLOPS = "epochs", "flops"
"""What a run is given as much of as another: the recipe's epochs, or the reference's operations."""


@dataclass(frozen=True)
class Task:
    """Images and a network.

    Attributes:
        recipe: how it is trained.
        held_out: training images that are taken away, to judge sections on.
        methods: those that it is trained by.
        equal_flops: those of them that it is trained by once more, with the reference's operations.
        seeds: its seeds.
        variations: what the reference is trained with as well: changes of recipe by their name, and
            under "init" the scheme of initialisation.
        variation_seeds: the seeds of these.
    """

    recipe: Recipe
    held_out: int
    methods: tuple[str, ...]
    equal_flops: tuple[str, ...]
    seeds: tuple[int, ...]
    variations: dict[str, dict[str, Any]]
    variation_seeds: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Cell:
    """One run.

    Attributes:
        task: name of the task.
        method: one of `METHODS`, or `REINSERTION`.
        setting: name of a variation of the task, or "".
        budget: what it is given as much of: `EPOCHS` or `FLOPS`.
        seed: of everything.
    """

    task: str
    method: str
    setting: str = ""
    budget: str = EPOCHS
    seed: int = 0

    def __str__(self) -> str:
        setting = f" ({self.setting})" if self.setting else ""
        budget = " at equal operations" if self.budget == FLOPS else ""
        return f"{self.task}, {self.method}{setting}{budget}, seed {self.seed}"

    @property
    def file(self) -> str:
        """The name of its result's file."""
        setting = f"+{self.setting.replace(' ', '_')}" if self.setting else ""
        budget = "@flops" if self.budget == FLOPS else ""
        return f"{self.task}--{self.method}{setting}{budget}--{self.seed}.json"

    def needs(self) -> list[Cell]:
        """The cells whose results it takes."""
        reference = Cell(self.task, REFERENCE, seed=self.seed)
        if self.budget == FLOPS:
            return [reference, replace(self, budget=EPOCHS)]
        return [reference] if self.method in GIVEN_DEPTH else []


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        name: the study's name.
        tasks: by name.
        reinsertions: tasks of which one network is taken to see what eliminated sections are worth.
    """

    name: str
    tasks: dict[str, Task]
    reinsertions: tuple[str, ...] = ()

    def cells(self) -> Iterator[Cell]:
        """All runs, those of a task together."""
        for name, task in self.tasks.items():
            for seed in task.seeds:
                for method in task.methods:
                    yield Cell(name, method, seed=seed)
                for method in task.equal_flops:
                    yield Cell(name, method, budget=FLOPS, seed=seed)
            for seed in task.variation_seeds:
                for setting in task.variations:
                    yield Cell(name, REFERENCE, setting, seed=seed)
            if name in self.reinsertions:
                yield Cell(name, REINSERTION, seed=task.seeds[0])

    def recipe_of(self, cell: Cell) -> tuple[Recipe, str | None]:
        """A cell's recipe and its scheme of initialisation."""
        task = self.tasks[cell.task]
        changes = dict(task.variations.get(cell.setting, {}))
        init = changes.pop("init", None)
        one = task.recipe
        config = one.prune_config | changes.pop("prune_config", {})
        return recipe.override(one, seed=cell.seed, prune_config=config, **changes), init


def load(
    name: str,
    *,
    tasks: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    datasets: dict[str, str] | None = None,
) -> Study:
    """Reads a study.

    Args:
        name: of a study beside this module, or a YAML file's path.
        tasks: take these of its tasks only.
        methods: take these of its methods only; what they need is run along.
        seeds: for every task, in place of its own.
        datasets: data sets to put in the place of others.

    Raises:
        StudyError: no such study, task, method or data set, or something in it is wrong.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
        raise StudyError(f"no such study: {name}; the studies are {known} (or a .yaml file's path)")
    try:
        given = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is no YAML: {error}") from error
    check_study(path, given)
    chosen = _chosen("task", tasks, given["tasks"])
    there = {method for name in given["tasks"] for method in settings_of(given, name)["methods"]}
    wanted = _chosen("method", methods, [name for name in METHODS if name in there])
    unknown = set(datasets or ()) - {
        task["recipe"].get("dataset") for task in given["tasks"].values()
    }
    if unknown:
        raise StudyError(f"{path} has no task on {', '.join(sorted(unknown))}")
    study = Study(
        name=path.stem,
        tasks={name: _task(name, given, wanted, seeds, datasets or {}) for name in chosen},
        reinsertions=() if methods is not None else tuple(given.get("reinsertions", ())),
    )
    for cell in study.cells():
        chosen, init = study.recipe_of(cell)
        if init is not None and init not in SCHEMES:
            raise StudyError(f"{path}: unknown init {init}; it is one of {', '.join(SCHEMES)}")
        if cell.method in GATED and (chosen.grad_accum_steps > 1 or chosen.amp_dtype == "float16"):
            raise StudyError(
                f"{path}: {cell.method} of {cell.task} draws its gates once a step and has no "
                "scaler: it goes without grad_accum_steps and float16"
            )
    return study


def _task(
    name: str,
    study: dict,
    methods: Sequence[str],
    seeds: Iterable[int] | None,
    datasets: dict[str, str],
) -> Task:
    given = settings_of(study, name)
    settings = {"name": name, **given["recipe"]}
    settings["dataset"] = datasets.get(settings["dataset"], settings["dataset"])
    return Task(
        recipe.from_mapping(settings, name),
        given["held_out"],
        methods=tuple(method for method in given["methods"] if method in methods),
        equal_flops=tuple(method for method in given.get("equal_flops", ()) if method in methods),
        seeds=tuple(given["seeds"] if seeds is None else seeds),
        variations=study.get("variations", {}).get(name, {}) if REFERENCE in methods else {},
        variation_seeds=tuple(study["seeds"] if seeds is None else seeds),
    )


def _chosen(kind: str, wanted: Iterable[str] | None, there: Iterable[str]) -> tuple[str, ...]:
    there = tuple(there)
    unknown = set(wanted or ()) - set(there)
    if unknown:
        raise StudyError(
            f"no {kind} {', '.join(sorted(unknown))} in this study; it has {', '.join(there)}"
        )
    return tuple(name for name in there if wanted is None or name in wanted)
