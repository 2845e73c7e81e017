"""`LayerPruner`: finds out while a model trains which sections it does not need, and removes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from layerprune import ops
from layerprune.compaction import check_optimizer, remove_sections
from layerprune.config import Phase, PruneConfig, Schedule
from layerprune.cost import Inputs, batch_size_of, forward_flops
from layerprune.difference import OutputPath
from layerprune.elimination import Measurement, Verdict, in_domain_of_attraction
from layerprune.gates import GateBank
from layerprune.judge import Event, Judge, Status
from layerprune.ledger import BACKWARD, Ledger
from layerprune.ops.projected_step import STATISTICS, standard_error
from layerprune.prior import penalties
from layerprune.sections import Section, find_sections
from layerprune.sections.discovery import Ignored

FORMAT = 1
"""Version of `LayerPruner.state_dict`."""

_PROBE_SHARE = 0.125
"""Probed share of a section's rows at the most."""


@dataclass(frozen=True)
class SectionInfo:
    """One of the sections that the model started with.

    Attributes:
        name: the module's qualified name.
        kind: ``"residual"``, ``"twin"`` or ``"opaque"``.
        theta: keep probability.
        cost: cost by which its penalty was set, in units of the mean section's.
        penalty: nu, the loss difference that the section must be worth.
        status: ``"open"``, ``"settled"`` or ``"eliminated"``.
        parameters: parameters of its branch.
        flops: operations of one row's forward through its branch.
    """

    name: str
    kind: str
    theta: float
    cost: float
    penalty: float
    status: Status
    parameters: int
    flops: float


@dataclass(frozen=True)
class StepReport:
    """What one `LayerPruner.step` did.

    Attributes:
        step: the step's number, from 1.
        phase: the phase it belonged to.
        changed: whether the model and the optimizer were compacted.
        eliminated: names of the sections that left.
        events: all decisions that fell.
    """

    step: int
    phase: Phase
    changed: bool
    eliminated: tuple[str, ...]
    events: tuple[Event, ...]


class _Hook:
    """A forward hook that a copy or a pickle of the model does not take along."""

    def __init__(self, call: Callable[..., object] | None = None) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return None if self._call is None else self._call(*args)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple:
        return _Hook, ()


class LayerPruner:
    """Trains a model's depth: gates its sections, moves their keep probabilities, removes the useless.

    Use it as the optimizer is used::

        pruner = layerprune.LayerPruner(model, example_inputs=x, total_steps=1000, strength=0.01)
        for x, y in loader:
            criterion(model(x), y).backward()
            optimizer.step()
            pruner.step(optimizer)
            optimizer.zero_grad()
        plain = pruner.strip()

    Gates are drawn at every forward in training mode; evaluation is deterministic.

    Args:
        model: the model; its sections are gated in place.
        example_inputs: what the model is called with: a tensor, a sequence or a mapping.
        total_steps: number of `step` calls of the whole run; the phases follow from it.
        strength: the loss that a section of mean cost must be worth.
        cost: ``"flops"``, ``"params"``, ``"uniform"``, or a mapping from section name to cost.
        config: further settings.
        sections: the sections to gate; ``None`` for all that `find_sections` finds.
        ignored: modules, types or name patterns that `find_sections` leaves out.
        loss_reduction: whether the loss is the ``"mean"`` or the ``"sum"`` over the batch's rows.
        seed: key of the gates' random stream.

    Raises:
        ValueError: if there are no sections, or an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        example_inputs: Inputs,
        total_steps: int | None = None,
        strength: float,
        cost: str | Mapping[str, float] = "flops",
        config: PruneConfig | None = None,
        sections: Sequence[Section] | None = None,
        ignored: Ignored = (),
        loss_reduction: str = "mean",
        seed: int = 0,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
        self.model = model
        self.config = config or PruneConfig()
        self.schedule = Schedule.from_config(self.config, total_steps)
        self.loss_reduction = loss_reduction
        found = find_sections(model, example_inputs, ignored) if sections is None else sections
        self._sections = list(found)
        if not self._sections:
            raise ValueError(
                f"{type(model).__name__} has no section that can be gated: build it with GatedResidual, "
                "or pass `sections`"
            )
        count = len(self._sections)
        flops = forward_flops(model, example_inputs)
        self._branch_flops = [section.branch_flops(flops) for section in self._sections]
        self._model_flops = flops.get("", 0.0)
        self._parameters = [
            sum(p.numel() for p in section.branch_parameters()) for section in self._sections
        ]
        costs = self._costs(cost)
        self._cost = costs / costs.mean()
        self.penalty = penalties(strength, costs)

        names = [section.name for section in self._sections]
        self._bank = GateBank(names, self.config, seed)
        self._statistics = torch.zeros(STATISTICS, count)
        self._in_play = torch.zeros(count, dtype=torch.bool)
        self._status: list[Status] = ["open"] * count
        self._judge = Judge(self.penalty, self.config, recheck=self.schedule.horizon)
        self._path: OutputPath | None = None
        self._measured: Measurement | None = None
        self._drawn = False
        self._learning_since: int | None = None
        self.step_count = 0
        self.events: list[Event] = []
        self.ledger = Ledger()
        for section, gate in zip(self._sections, self._bank.gates, strict=True):
            section.adapter.attach(section.module, gate)
        self._allocate_probes()
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True),
            model.register_forward_hook(_Hook(self._after_forward), with_kwargs=True),
        ]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.schedule.total_steps

    @property
    def phase(self) -> Phase:
        """The phase of the step to come."""
        if self.step_count >= self.schedule.learning_end:
            return "cool-down"
        return "warm-up" if self._learning_since is None else "learning"

    @property
    def sections(self) -> tuple[SectionInfo, ...]:
        """All sections that the model started with, in its order."""
        return tuple(
            SectionInfo(
                section.name,
                section.kind,
                float(self._bank.theta[index]),
                float(self._cost[index]),
                float(self.penalty[index]),
                self._status[index],
                self._parameters[index],
                self._branch_flops[index],
            )
            for index, section in enumerate(self._sections)
        )

    def draw(self, batch_size: int) -> None:
        """Draws the gates of the next forward ahead of it, where hooks do not run."""
        self._draw(batch_size, None)
        self._drawn = True

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        accumulation: int = 1,
    ) -> StepReport:
        """Ends a training step: moves theta, decides, and compacts model and optimizer.

        Call it after ``optimizer.step()`` and before ``optimizer.zero_grad()``; with a scaler, between
        ``scaler.step`` and ``scaler.update``.

        Args:
            optimizer: holds the model's parameters; sections that leave the model leave it too.
            scaler: the gradient scaler in use; a step that it skips moves no theta either.
            accumulation: micro-batches of this step, if each one's loss was divided by their number.

        Raises:
            FloatingPointError: if a gate's gradient is not finite and no scaler accounts for it.
            TypeError: if the optimizer cannot be compacted.
            ValueError: if the optimizer holds none of the model's parameters.
        """
        with self.ledger.timed("step"):
            if self.step_count == 0:
                check_optimizer(self.model, optimizer)
                if self.config.rule == "attraction":
                    self._check_decay(optimizer)
            scale = (scaler.get_scale() if scaler is not None else 1.0) / accumulation
            phase, first_event = self.phase, len(self.events)
            self._move_theta(phase, scale, skipping=scaler is not None)
            if self._path is not None:
                self._measured = self._path.result(scale)
                self._path = None
                if self._measured is not None and not self._measured.is_finite:
                    self._refuse_overflow(scaler is not None)
                    self._measured = None
            gone = self._decide(phase)
            if gone:
                self._eliminate(gone, optimizer)
            self.step_count += 1
            if phase == "warm-up" and self._warm():
                self._learning_since = self.step_count
            if self.step_count == self.schedule.learning_end:
                self._judge.begin_rounding(
                    self._status.count("open"), self.total_steps - self.step_count
                )
            self._bank.advance()
            self._allocate_probes()
        names = tuple(self._sections[index].name for index in gone)
        events = tuple(self.events[first_event:])
        return StepReport(self.step_count, phase, bool(gone), names, events)

    def strip(self) -> nn.Module:
        """Ends pruning: the same model without gates, of its original classes.

        Sections still undecided are kept or removed as evaluation would have it (theta >= 1/2).
        """
        self.close()
        closed = [
            self._sections[index]
            for index, state in enumerate(self._status)
            if state == "open" and float(self._bank.theta[index]) < 0.5
        ]
        for section, state in zip(self._sections, self._status, strict=True):
            if state != "eliminated":
                section.adapter.detach(section.module)
        remove_sections(self.model, closed)
        return self.model

    def close(self) -> None:
        """Takes the hooks off the model and opens the gates in training mode."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._bank.open_all()

    def structure(self) -> dict:
        """The sections and what became of them, as JSON would have it."""
        return {
            "sections": [
                {"name": info.name, "kind": info.kind, "theta": info.theta, "status": info.status}
                for info in self.sections
            ],
            "eliminated": [info.name for info in self.sections if info.status == "eliminated"],
        }

    def state_dict(self) -> dict:
        """Everything a resumed run needs; loads under ``torch.load(weights_only=True)``."""
        return {
            "format": FORMAT,
            "names": [section.name for section in self._sections],
            "total_steps": self.total_steps,
            "step_count": self.step_count,
            "learning_since": self._learning_since,
            "status": list(self._status),
            "penalty": self.penalty.clone(),
            "bank": self._bank.state_dict(),
            "statistics": self._statistics.clone(),
            "in_play": self._in_play.clone(),
            "judge": self._judge.state_dict(),
            "events": [asdict(event) for event in self.events],
            "ledger": asdict(self.ledger),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores a run on a pruner made on the dense model: eliminated sections leave it at once.

        Load the weights and make the optimizer afterwards.

        Raises:
            ValueError: if the state is of another format, model or schedule, or this pruner has run.
        """
        names = [section.name for section in self._sections]
        if state.get("format") != FORMAT:
            raise ValueError(
                f"this pruner state has format {state.get('format')!r}, this version reads {FORMAT}"
            )
        if state["names"] != names:
            raise ValueError(
                f"the state speaks of {len(state['names'])} sections ({state['names'][:2]}...), the model "
                f"has {len(names)} ({names[:2]}...): it belongs to another model"
            )
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the state is of a run of {state['total_steps']} steps, this pruner was made for "
                f"{self.total_steps}"
            )
        if self.step_count:
            raise ValueError("load the state into a pruner freshly made on the dense model")
        self.step_count = state["step_count"]
        self._learning_since = state["learning_since"]
        self._status = list(state["status"])
        self.penalty.copy_(state["penalty"])
        self._bank.load_state_dict(state["bank"])
        self._statistics.copy_(state["statistics"])
        self._in_play.copy_(state["in_play"])
        self._judge.load_state_dict(state["judge"])
        self.events = [Event(**event) for event in state["events"]]
        self.ledger = Ledger(**state["ledger"])
        gone = [s for s, status in zip(self._sections, self._status, strict=True) if status == "eliminated"]
        for section in gone:
            section.adapter.detach(section.module)
        remove_sections(self.model, gone)

    def __str__(self) -> str:
        width = max(len(section.name) for section in self._sections)
        lines = [f"{'section':<{width}}  theta  penalty  status"]
        lines += [
            f"{info.name:<{width}}  {info.theta:5.2f}  {info.penalty:7.4f}  {info.status}"
            for info in self.sections
        ]
        return "\n".join(lines)

    # Forwards

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        alive = [
            section.module.training
            for section, status in zip(self._sections, self._status, strict=True)
            if status != "eliminated"
        ]
        if not (any(alive) if alive else model.training):
            return
        if self._drawn:
            self._drawn = False
            return
        self._draw(batch_size_of((args, kwargs)), (args, kwargs))

    def _draw(self, batch_size: int, call: tuple[tuple, dict] | None) -> None:
        recording = torch.is_grad_enabled()
        candidate = None
        measuring = self.phase == "cool-down" or (
            self.phase == "learning" and self.config.rule == "test"
        )
        if recording and self._path is None and call is not None and measuring:
            candidate = self._judge.choose(
                self.step_count, self._bank.theta, self._status, self.phase == "learning"
            )
        skip = frozenset(i for i, status in enumerate(self._status) if status != "open")
        forced = {}
        if candidate is not None:
            forced[candidate] = 1.0 if float(self._bank.theta[candidate]) >= 0.5 else 0.0
        running = None
        with self.ledger.timed("draw"):
            if len(skip) == len(self._status):
                self._bank.open_all()
            else:
                running = self._bank.draw(
                    batch_size,
                    skip=skip,
                    forced=forced,
                    record=recording,
                    device=next(self.model.parameters()).device,
                )
        if recording:
            self._account(batch_size, running)
        if candidate is not None:
            self._path = OutputPath(
                candidate,
                self._bank.gates[candidate],
                self._bank.gates,
                self.model,
                trained_on=forced[candidate] > 0.5,
                rng=(self._bank.seed, self._bank.draw_number),
                batch_size=batch_size,
                rows_factor=self._rows_factor(batch_size),
            )

    def _account(self, batch_size: int, running: list[int] | None) -> None:
        self._last_flops = [
            flops * (0 if status == "eliminated" else running[index] if running else batch_size)
            for index, (flops, status) in enumerate(
                zip(self._branch_flops, self._status, strict=True)
            )
        ]
        self._last_fixed = batch_size * (self._model_flops - sum(self._branch_flops))
        spent = self._last_fixed + sum(self._last_flops)
        self.ledger.train_flops += (1 + BACKWARD) * spent
        self.ledger.dense_train_flops += (1 + BACKWARD) * batch_size * self._model_flops
        self._batch_size = batch_size

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        path = self._path
        if path is None or not path.waiting:
            return None
        with self.ledger.timed("test"):
            mixed = path.finish(model, args, kwargs, output)
        replayed = path.replayed()
        spent = self._last_fixed
        for index, gate in enumerate(self._bank.gates):
            if index == path.index:
                spent += 0 if path.trained_on else self._branch_flops[index] * self._batch_size
            elif gate not in replayed:
                spent += self._last_flops[index]
        self.ledger.test_flops += spent
        self.ledger.train_flops += spent
        return mixed

    def _rows_factor(self, batch_size: int) -> float:
        return float(batch_size) if self.loss_reduction == "mean" else 1.0

    # Steps

    def _move_theta(self, phase: Phase, scale: float, skipping: bool) -> None:
        evidence = self._bank.collect(self._rows_factor, scale)
        if evidence is None or phase == "cool-down":
            return
        slope, counted = evidence
        if not bool(slope.isfinite().all()):
            self._refuse_overflow(skipping)
            return
        free = torch.tensor([status == "open" for status in self._status])
        if phase == "warm-up":
            free.zero_()
        if self._judge.current is not None:
            free[self._judge.current] = False
        config, horizon = self.config, self.schedule.horizon
        ops.projected_gate_step_(
            self._bank.theta,
            self._statistics,
            self._in_play,
            slope,
            counted,
            self.penalty,
            free,
            horizon=horizon,
            noise_factor=config.noise_factor,
            decay=1 - 1 / (horizon + 1),
            confidence=config.confidence,
            max_descending=config.max_descending,
        )

    def _refuse_overflow(self, skipping: bool) -> None:
        if not skipping:
            raise FloatingPointError(
                f"a gate's gradient is not finite in step {self.step_count + 1}: the loss or the model's "
                "outputs overflowed"
            )

    def _warm(self) -> bool:
        if self.step_count < self.schedule.warm_up_end:
            return False
        bound = self._statistics[3] + 2 * standard_error(self._statistics) + self.penalty
        return bool((bound < 0).any()) or self.step_count >= self.schedule.warm_up_limit

    def _decide(self, phase: Phase) -> list[int]:
        """Acts on the newest measurement; returns the sections to eliminate."""
        if self.config.rule == "attraction" and phase == "learning":
            return self._drawn_to_zero()
        index, measured = self._judge.current, self._measured
        self._measured = None
        if index is None or measured is None:
            return []
        learning = phase == "learning"
        verdict = self._judge.hear(measured, self.step_count, learning)
        return [] if verdict is None else self._apply(index, verdict, learning)

    def _apply(self, index: int, verdict: Verdict, learning: bool) -> list[int]:
        theta = float(self._bank.theta[index])
        low = theta <= self.config.tolerance
        if not learning:
            decision = "rounded-off" if verdict.useless else "rounded-on"
        elif verdict.useless:
            decision = "eliminated" if low else "closed"
        else:
            decision = "kept" if low else "settled"
        self._record(index, decision, "test" if learning else "rounding", verdict)
        if decision in ("eliminated", "rounded-off"):
            return [index]
        if decision in ("settled", "rounded-on"):
            self._status[index] = "settled"
            self._bank.theta[index] = 1.0
            self._bank.gates[index].draw = None
            self._judge.settle(index, self.step_count)
        else:
            self._status[index] = "open"
            self._bank.theta[index] = 0.0 if decision == "closed" else 0.5
            self._statistics[:, index] = 0
        return []

    def _check_decay(self, optimizer: torch.optim.Optimizer) -> None:
        """The attraction rule rests on weight decay of everything in a branch."""
        decayed = {
            id(p)
            for group in optimizer.param_groups
            if group.get("weight_decay", 0) > 0
            for p in group["params"]
        }
        for section in self._sections:
            if any(id(p) not in decayed for p in section.branch_parameters()):
                raise ValueError(
                    f'rule="attraction" needs weight decay on every parameter of section '
                    f'{section.name!r}, BatchNorm\'s included; give the optimizer a weight_decay, or use '
                    'rule="test"'
                )

    def _drawn_to_zero(self) -> list[int]:
        gone = []
        for index, section in enumerate(self._sections):
            theta = float(self._bank.theta[index])
            if self._status[index] == "open" and in_domain_of_attraction(
                theta, section.branch_parameters(), self.config.tolerance
            ):
                self._record(index, "eliminated", "attraction", None)
                gone.append(index)
        return gone

    def _record(self, index: int, decision: str, by: str, verdict: Verdict | None) -> None:
        self.events.append(
            Event(
                self.step_count + 1,
                self._sections[index].name,
                decision,
                by,
                verdict and verdict.difference,
                verdict and verdict.standard_error,
                verdict.batches if verdict else 0,
                float(self.penalty[index]),
                float(self._bank.theta[index]),
            )
        )

    def _eliminate(self, gone: list[int], optimizer: torch.optim.Optimizer) -> None:
        for index in gone:
            self._sections[index].adapter.detach(self._sections[index].module)
            self._status[index] = "eliminated"
            self._bank.theta[index] = 0.0
        remove_sections(self.model, [self._sections[index] for index in gone], optimizer)
        # The network is another one now: what is known of the others counts half.
        weakened = torch.tensor([0.5, 0.5, 0.5, 1.0, 0.5])
        self._statistics.mul_(weakened[:, None])

    def _allocate_probes(self) -> None:
        """Shares the probe budget: sections in play first, the others take what is left."""
        rate = self._bank.probe_rate.zero_()
        if self.phase == "cool-down":
            return
        theta = self._bank.theta.tolist()
        playing, others = [], []
        for index, status in enumerate(self._status):
            waiting = theta[index] <= self.config.tolerance or index == self._judge.current
            if status == "open" and not waiting:
                (playing if self._in_play[index] else others).append(index)
        budget = self.config.probe_budget
        if playing:
            share = min(_PROBE_SHARE, 0.75 * budget / len(playing))
            rate[playing] = share
            budget -= share * len(playing)
        if others:
            # By turns, so that each one's rows are many at a time and rare.
            turns = math.ceil(len(others) * _PROBE_SHARE / budget)
            rate[others[self.step_count % turns :: turns]] = _PROBE_SHARE

    def _costs(self, cost: str | Mapping[str, float]) -> Tensor:
        names = [section.name for section in self._sections]
        if isinstance(cost, Mapping):
            missing = [name for name in names if name not in cost]
            if missing:
                raise ValueError(f"cost gives no value for section {missing[0]!r}")
            values = [float(cost[name]) for name in names]
        elif cost == "uniform":
            values = [1.0] * len(names)
        elif cost == "params":
            values = [float(count) for count in self._parameters]
        elif cost == "flops":
            values = self._branch_flops
        else:
            raise ValueError(
                f'cost must be "flops", "params", "uniform" or a mapping by section name, got {cost!r}'
            )
        return torch.tensor(values)
