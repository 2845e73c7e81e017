"""What is compared: each method is what it does to the network before, in and after every step.

All train by the product's own step (`layerprune.training.step.TrainStep`), on the same images, with
the same schedule. A method decides which sections there are and what their gates are; training
operations are counted for each by the same rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from layerprune.compaction import eliminate_sections
from layerprune.cost import forward_flops, relative_costs
from layerprune.ledger import BACKWARD
from layerprune.prior import penalties
from layerprune.sections import Section, find_sections
from layerprune.training.assembly import Network, build_network
from layerprune.training.checkpoint import example_inputs
from layerprune.training.data import DataSplits
from layerprune.training.images import Stream, derived_seed
from layerprune.training.recipe import Recipe
from study import selection
from study.gating import FixedGates, HardConcreteGates
from study.initialisation import initialise


@dataclass(frozen=True)
class Setup:
    """What a method starts from.

    Attributes:
        recipe: the settings.
        splits: the images.
        device: where to train.
        epochs: how many to train, where they are not the recipe's: an equal budget of operations.
        init: the scheme by which weights are initialised, or None for the network's own.
        reference: the result of `ours` on the same images with the same seed, for methods that are
            given its depth.
    """

    recipe: Recipe
    splits: DataSplits
    device: torch.device
    epochs: int | None = None
    init: str | None = None
    reference: dict | None = None


class Method:
    """Trains what `choose` leaves of the dense network, without gates.

    Args:
        setup: what to start from.
        choose: names the sections that are left out from the start.

    Attributes:
        recipe: the settings that it is trained with.
        network: what is trained.
        example: what the network is called with.
        dense_flops: operations of one image's forward with all sections.
        dense_sections: how many they are.
        train_flops: operations spent.
        test_flops: those of them that decisions took.
    """

    prunes = False

    def __init__(
        self,
        setup: Setup,
        choose: Callable[[Setup, nn.Module, list[Section]], list[str]] = selection.nothing,
    ) -> None:
        self.recipe = replace(
            setup.recipe, epochs=setup.epochs or setup.recipe.epochs, prune=self.prunes
        )
        torch.manual_seed(self.recipe.seed)
        self.network: Network = build_network(self.recipe, setup.splits, setup.device)
        model = self.network.model
        initialise(model, setup.init)
        self.example = example_inputs(self.network.builder["kwargs"])
        self.sections = find_sections(model, self.example)
        self.dense_sections = len(self.sections)
        self.dense_flops = forward_flops(model, self.example)[""]
        gone = choose(setup, model, self.sections)
        eliminate_sections(model, gone, self.example)
        self.sections = [section for section in self.sections if section.name not in gone]
        self.train_flops = self.test_flops = 0.0
        counted = forward_flops(model, self.example)
        self.flops = counted[""]
        self.branch_flops = [section.branch_flops(counted) for section in self.sections]

    def before_step(self, rows: int) -> None:
        """Prepares for a forward of so many rows."""
        self._spend(rows * self.flops)

    def _spend(self, forward: float) -> None:
        self.train_flops += (1 + BACKWARD) * forward

    def after_step(self, progress: float) -> None:
        """Learns from a step; ``progress`` is the share of training done."""

    def finish(self) -> list[str]:
        """Leaves a plain network; returns the names of the sections that are in it."""
        return [section.name for section in self.sections]

    def report(self) -> dict:
        """What else is known of the run."""
        return {}


class Gated(Method):
    """Trains with gates that are not the pruner's: all sections stay until the end."""

    def __init__(self, setup: Setup, gates: Callable[..., FixedGates | HardConcreteGates]) -> None:
        super().__init__(setup)
        self.gates = gates(self)

    def before_step(self, rows: int) -> None:
        """Hands every section its gates."""
        running = self.gates.draw(rows)
        fixed = self.flops - sum(self.branch_flops)
        spent = zip(self.branch_flops, running, strict=True)
        self._spend(rows * fixed + sum(flops * count for flops, count in spent))

    def after_step(self, progress: float) -> None:
        """Moves what the gates have learned."""
        self.gates.step(progress)

    def finish(self) -> list[str]:
        """See `Method`."""
        gone = self.gates.finish()
        eliminate_sections(self.network.model, gone, self.example)
        return [section.name for section in self.sections if section.name not in gone]


class Pruned(Method):
    """Trains with a `LayerPruner`.

    Args:
        setup: what to start from.
        **config: fields of `PruneConfig` that differ from the recipe's.
    """

    prunes = True

    def __init__(self, setup: Setup, **config: object) -> None:
        chosen = setup.recipe.prune_config | config
        super().__init__(replace(setup, recipe=replace(setup.recipe, prune_config=chosen)))
        self.pruner = self.network.pruner
        self.at_learning_end: list[float] = []

    def before_step(self, rows: int) -> None:
        """The pruner draws by itself."""

    def after_step(self, progress: float) -> None:
        """Notes what the step took, and the thetas that learning ended with."""
        pruner = self.pruner
        self.train_flops, self.test_flops = pruner.ledger.train_flops, pruner.ledger.test_flops
        if pruner.step_count == pruner.schedule.learning_end:
            self.at_learning_end = [
                info.theta for info in pruner.sections if info.status != "eliminated"
            ]

    def finish(self) -> list[str]:
        """See `Method`."""
        self.pruner.strip()
        return [info.name for info in self.pruner.sections if info.status != "eliminated"]

    def report(self) -> dict:
        """The decisions, when sections went, and what each must be worth."""
        pruner = self.pruner
        gone = [e for e in pruner.events if e.decision in ("eliminated", "rounded-off")]
        last = {event.section: event for event in pruner.events}
        tolerance = pruner.config.tolerance
        return {
            "eliminations": [[e.step / pruner.total_steps, e.section, e.by] for e in gone],
            "decided_by_test": sum(event.by == "test" for event in last.values()),
            "decided_by_rounding": sum(event.by == "rounding" for event in last.values()),
            "thetas_between": sum(tolerance < t < 1 - tolerance for t in self.at_learning_end),
            "penalties": {info.name: info.penalty for info in pruner.sections},
            "overhead_seconds": pruner.ledger.draw_seconds
            + pruner.ledger.step_seconds
            + pruner.ledger.test_seconds,
        }


def _linear_decay(method: Method, **options: bool) -> FixedGates:
    return FixedGates(method.sections, method.recipe.seed, **options)


def _hard_concrete(method: Method) -> HardConcreteGates:
    recipe, sections = method.recipe, method.sections
    parameters = [sum(p.numel() for p in section.branch_parameters()) for section in sections]
    names = [section.name for section in sections]
    costs = relative_costs(recipe.cost, names, parameters, method.branch_flops)
    return HardConcreteGates(
        sections,
        penalties(recipe.strength, costs),
        derived_seed(recipe.seed, 0, Stream.ORDER),
        next(method.network.model.parameters()).device,
    )


METHODS: dict[str, Callable[[Setup], Method]] = {
    "dense": Method,
    "ours": Pruned,
    "taylor": lambda setup: Pruned(setup, estimator="taylor"),
    "simultaneous": lambda setup: Pruned(setup, max_descending=None),
    "stochastic-depth": lambda setup: Gated(setup, _linear_decay),
    "stochastic-depth-dense": lambda setup: Gated(
        setup, lambda method: _linear_decay(method, run_all_rows=True)
    ),
    "l0": lambda setup: Gated(setup, _hard_concrete),
    "random": lambda setup: Method(setup, selection.at_random),
    "grasp": lambda setup: Method(setup, selection.by_gradient_flow),
    "scratch": lambda setup: Method(setup, selection.first_of_stages),
    "retrained": lambda setup: Method(setup, selection.as_reference),
}
"""By name. The last four need the reference."""

GATED = ("stochastic-depth", "stochastic-depth-dense", "l0")
"""Those with gates that are not the pruner's: drawn once a step, trained without a scaler."""

GIVEN_DEPTH = ("random", "grasp", "scratch", "retrained")
