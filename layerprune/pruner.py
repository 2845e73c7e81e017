"""`LayerPruner`: finds out while a model trains which sections it can do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from layerprune import ops
from layerprune.agreement import Agreement, digest
from layerprune.calls import Inputs, evaluating
from layerprune.compaction import branch_keys
from layerprune.config import Phase, PruneConfig, Schedule
from layerprune.cost import forward_flops, relative_costs
from layerprune.course import change_phase, learn
from layerprune.decisions import check_decay, round_by_theta
from layerprune.depth import note_eliminated
from layerprune.difference import measured_difference
from layerprune.drop_path import stochastic_depth
from layerprune.evidence import PendingEvidence
from layerprune.forwards import Forwards
from layerprune.gates import GateBank
from layerprune.idle import drop_idle_gradients
from layerprune.info import SectionInfo, StepReport, table
from layerprune.judge import Event, Judge
from layerprune.latency import section_latencies
from layerprune.learner import ThetaLearner
from layerprune.ledger import Ledger
from layerprune.network import Network
from layerprune.optimizers import check_optimizer, step_optimizers
from layerprune.prior import penalties
from layerprune.ranks import Ranks
from layerprune.run import RunState
from layerprune.sections import Section
from layerprune.sections.discovery import Ignored, survey
from layerprune.wrapping import check_unwrapped, renew


class LayerPruner:
    """Trains a model's depth: gates its sections and removes those that do not pay.

    Use it as the optimizer is used::

        pruner = layerprune.LayerPruner(model, example_inputs=x, total_steps=1000, strength=0.01)
        for x, y in loader:
            criterion(model(x), y).backward()
            optimizer.step()
            pruner.step(optimizer)
            optimizer.zero_grad()
        plain = pruner.strip()

    Gates are drawn at every forward in training mode; evaluation is deterministic. A copy of the
    model is not compacted along, but for an average of it given as ``ema``.

    With torch.distributed, make the pruner on every rank after ``init_process_group``, then wrap
    the model in DistributedDataParallel. Each rank draws for its own part of the batch; they learn
    and decide from the evidence of all. `step`, `draw`, `state_dict` and `load_state_dict` are
    called on all ranks; losses are means (or sums) over a rank's own rows.

    Args:
        model: the model; its sections are gated in place.
        example_inputs: what the model is called with: a tensor, a sequence or a mapping.
        total_steps: number of `step` calls of the whole run; the phases follow from it.
        strength: the loss that a section of mean cost must be worth.
        cost: ``"flops"``, ``"params"``, ``"uniform"``, ``"latency"`` (seconds of a training step,
            measured on ``example_inputs``: pass a whole batch), or a mapping from section name to
            cost.
        config: further settings.
        sections: the sections to gate; ``None`` for all that `find_sections` finds.
        ignored: modules, types or name patterns that `find_sections` leaves out.
        loss_reduction: whether the loss is the ``"mean"`` or the ``"sum"`` over the batch's rows.
        ema: an average of this model, which is compacted along, and whose sections are open where
            the model's are in evaluation.
        seed: key of the gates' random stream.

    Attributes:
        model: the model.
        left_out: residual blocks that have no gate, and why, by their names.

    Raises:
        ValueError: if there are no sections, or an argument is out of its range.
        TypeError: if the model is wrapped or sharded, or ``ema`` is no average.
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
        ema: AveragedModel | None = None,
        seed: int = 0,
    ) -> None:
        check_unwrapped(model)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}')
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an int in [0, 2**63), got {seed!r}")
        self.model = model
        self.loss_reduction = loss_reduction
        config = config or PruneConfig()
        schedule = Schedule.from_config(config, total_steps)
        self.left_out: dict[str, str] = {}
        if sections is None:
            surveyed = survey(model, example_inputs, ignored)
            sections, self.left_out = surveyed.sections, surveyed.left_out
        found = list(sections)
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no section that can be gated: build it with "
                "GatedResidual, or pass `sections`"
            )
        for section in found:
            if section.is_gated:
                raise ValueError(
                    f"section {section.name!r} already has a pruner: call its strip() first"
                )
        names = [section.name for section in found]
        self._network = Network(model, found, ema)
        flops = forward_flops(model, example_inputs)
        self._branch_flops = [section.branch_flops(flops) for section in found]
        self._parameters = [sum(p.numel() for p in s.branch_parameters()) for s in found]
        self.ranks = Ranks()
        self.ranks.check_alike(names)
        measured = cost == "latency"
        if measured:
            seconds = section_latencies(model, example_inputs, found)
            cost = dict(zip(names, self.ranks.mean(list(seconds.values())), strict=True))
        costs = relative_costs(cost, names, self._parameters, self._branch_flops)
        penalty = penalties(strength, costs)
        self._run = RunState(
            sections=self._network.sections,
            config=config,
            schedule=schedule,
            penalty=penalty,
            bank=GateBank(names, config, seed, self.ranks),
            judge=Judge(penalty, config, recheck=schedule.horizon),
            status=["open"] * len(found),
            measured=measured,
        )
        self._agreement = Agreement(self._run, self.ranks)
        self._optimizers: tuple[torch.optim.Optimizer, ...] | None = None
        self._step_hook = drop_idle_gradients(self._run) if self.ranks.count > 1 else None
        self._example_inputs = example_inputs
        self._stripped = self.renumbered = False
        self._ungated = False  # everything is decided, and the gates are off
        self._learner = ThetaLearner(self._run)
        self._network.attach(range(len(found)), self._run.bank)
        self._learner.allocate_probes()
        self._forwards = Forwards(
            model, self._run, self._rows_factor, flops.get("", 0.0), self._branch_flops
        )

    @property
    def config(self) -> PruneConfig:
        """The settings."""
        return self._run.config

    @property
    def schedule(self) -> Schedule:
        """The phases in steps."""
        return self._run.schedule

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._run.schedule.total_steps

    @property
    def step_count(self) -> int:
        """Steps done."""
        return self._run.step_count

    @property
    def phase(self) -> Phase:
        """The phase of the step to come."""
        return self._run.phase

    @property
    def events(self) -> list[Event]:
        """The decisions so far, in their order."""
        return self._run.events

    @property
    def ledger(self) -> Ledger:
        """What the run has spent."""
        return self._run.ledger

    @property
    def sections(self) -> tuple[SectionInfo, ...]:
        """All sections that the model started with, in its order."""
        run = self._run
        cost = run.penalty / run.penalty.mean()
        return tuple(
            SectionInfo(
                section.name,
                section.kind,
                float(run.bank.theta[index]),
                float(cost[index]),
                float(run.penalty[index]),
                run.status[index],
                self._parameters[index],
                self._branch_flops[index],
            )
            for index, section in enumerate(run.sections)
        )

    def draw(self, batch_size: int, drawn: ops.GateDraw | None = None) -> None:
        """Draws the gates of the next forward in training mode, which otherwise draws its own.

        Args:
            batch_size: rows of its batch.
            drawn: gates of all sections that the model started with, from `ops.sample_gates`, to
                use in place of the pruner's own draw. In a step that measures a section, that
                section's are replaced.

        Raises:
            ValueError: if ``drawn`` is of other sections or another batch size.
        """
        expected = (len(self._run.sections), batch_size)
        if drawn is not None and tuple(drawn.gates.shape) != expected:
            raise ValueError(
                f"drawn must be of {expected[0]} sections and {batch_size} rows, got gates of "
                f"shape {list(drawn.gates.shape)}"
            )
        self._forwards.draw(batch_size, drawn)

    def step(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None = None,
        accumulation: int = 1,
        *,
        skipped: bool = False,
    ) -> StepReport:
        """Ends a training step: moves theta, decides, and compacts model and optimizer.

        What it does rests on the backwards up to the step before: this step's evidence is sent to
        the host, where nobody waits for it.

        Call it after ``optimizer.step()`` and before ``optimizer.zero_grad()``; with a scaler,
        between ``scaler.step`` and ``scaler.update``.

        Args:
            optimizer: holds the model's parameters; sections that leave the model leave it too.
                Where several share them, a list of all.
            scaler: the gradient scaler in use; a step that it skips moves no theta either.
            accumulation: micro-batches of this step, if each one's loss was divided by their
                number.
            skipped: that the optimizer's step was left out, as a scaler does that was updated
                since, or one's own loop. Nothing is learnt from such a step, which counts all the
                same.

        Raises:
            FloatingPointError: if a gate's gradient was not finite in the step before, and no
                scaler accounts for it.
            TypeError: if the optimizer cannot be compacted, or the scaler is none.
            RuntimeError: if the scaler has not stepped the optimizer, or was updated since; if the
                ranks' pruners have come apart.
            ValueError: if the optimizer holds none of the model's parameters, or accumulation is
                not a whole number of at least 1.
        """
        run = self._run
        with run.ledger.timed("step"):
            optimizers = step_optimizers(optimizer, scaler, accumulation, skipped)
            self.ranks.check()
            if optimizers != self._optimizers:
                for each in optimizers:
                    check_optimizer(self.model, each)
                if run.config.rule == "attraction":
                    check_decay(run, optimizers)
                self._optimizers = optimizers
            phase, first_event = run.phase, len(run.events)
            if self._ungated:
                run.step_count += 1
                return StepReport(run.step_count, phase, False, (), ())
            run.evidence.put(
                PendingEvidence(
                    run.step_count + 1,
                    run.bank.collect(),
                    self._forwards.measurement(),
                    self._rows_factor,
                    optimizers,
                    scaler,
                    accumulation,
                    skipped,
                )
            )
            gone = learn(run, self._learner, run.evidence.take(self._agreement.pool))
            if run.step_count + 1 == run.schedule.total_steps:
                gone += round_by_theta(run, leaving=gone)
            if gone:
                self._eliminate(gone, optimizers)
            run.step_count += 1
            change_phase(run, self._learner, phase)
            run.bank.advance()
            self._learner.allocate_probes()
            self._take_gates_off_if_done()
        names = tuple(run.sections[index].name for index in gone)
        return StepReport(run.step_count, phase, bool(gone), names, tuple(run.events[first_event:]))

    def difference(self, section: str, loss: Callable[[], Tensor]) -> float:
        """The loss with a section on minus the loss with it off, in evaluation mode.

        For one's own checks; while training, the pruner measures such differences by itself. A
        section pays if its difference is below minus its penalty.

        Args:
            section: name of a section that is still in the model.
            loss: computes the loss of one fixed batch with the model; called twice.

        Raises:
            ValueError: if there is no such section any more.
        """
        gates = {
            info.name: gate
            for info, gate in zip(self.sections, self._run.bank.gates, strict=True)
            if info.status != "eliminated"
        }
        if section not in gates:
            raise ValueError(f"{section!r} is no section of the model; it has {sorted(gates)}")
        (index,) = [i for i, part in enumerate(self._run.sections) if part.name == section]
        if self._ungated:
            self._network.attach([index], self._run.bank)
        try:
            with evaluating(self.model):
                return measured_difference(self.model, gates[section], loss)
        finally:
            if self._ungated:
                self._network.detach([index])

    def rewrap(self, ddp: nn.Module) -> nn.Module:
        """Renews a DistributedDataParallel whose model was compacted: it expects fewer gradients.

        Call it on all ranks, where ``report.changed``.

        Args:
            ddp: the wrapper around this pruner's model, or around a module that holds it, or what
                torch.compile made of it; changed in place.

        Returns:
            ``ddp``.

        Raises:
            TypeError: if it is none, or of a kind that cannot be renewed.
            ValueError: if it holds another model.
        """
        wrapper = getattr(ddp, "_orig_mod", ddp)
        if not isinstance(wrapper, DistributedDataParallel):
            raise TypeError(f"ddp must be a DistributedDataParallel, got {type(wrapper).__name__}")
        if all(module is not self.model for module in wrapper.module.modules()):
            raise ValueError("ddp holds another model than this pruner's: pass the one around it")
        renew(wrapper)
        return ddp

    def digest(self) -> str:
        """A short name of what was decided and drawn so far; the same on all ranks."""
        return digest(self._run)

    def strip(self, renumber: bool = False) -> nn.Module:
        """Ends pruning: the same model without gates, of its original classes.

        Sections still undecided, where fewer than ``total_steps`` were made, are kept or removed as
        evaluation would have it (theta >= 1/2); an optimizer is not edited then.

        A torchvision ResNet that is renumbered loads into ``torchvision.models.ResNet(block,
        layers)`` with the smaller numbers of blocks if only blocks without a downsampling shortcut
        left and each stage has one still; otherwise into `models.torchvision_resnet`.

        Args:
            renumber: take the empty places out of numbered containers, of the model and of its
                average, as `renumber` does: names change then, and are no longer those of
                `structure` and of the events.

        Raises:
            ValueError: if the model cannot be renumbered. It is stripped, and has its names.
        """
        self.close()
        run = self._run
        if not self._stripped:
            self._settle_open()
            self._stripped = True
            gone = [run.sections[index].name for index in run.where("eliminated")]
            note_eliminated(self.model, gone, {section.name for section in run.sections})
        if renumber and not self.renumbered:
            self._network.renumber(run.where("eliminated"), self._example_inputs)
            self.renumbered = True
        return self.model

    def _settle_open(self) -> None:
        run = self._run
        closed = [i for i in run.where("open") if float(run.bank.theta[i]) < 0.5]
        left = [i for i, status in enumerate(run.status) if status != "eliminated"]
        if not self._ungated:
            self._network.detach(left)
        self._network.remove(closed)
        for index in closed:
            run.status[index] = "eliminated"

    def close(self) -> None:
        """Takes the hooks off the model and opens the gates in training mode."""
        self._forwards.close()
        if self._step_hook is not None:
            self._step_hook.remove()

    def structure(self) -> dict:
        """The sections and what became of them, as JSON would have it.

        ``eliminated`` names those that the model lacks, also the ones that `strip` has removed.
        """
        return {
            "sections": [
                {**section.description(), "theta": info.theta, "status": info.status}
                for info, section in zip(self.sections, self._run.sections, strict=True)
            ],
            "eliminated": [info.name for info in self.sections if info.status == "eliminated"],
        }

    def state_dict(self) -> dict:
        """Everything a resumed run needs; loads under ``torch.load(weights_only=True)``.

        The same on all ranks, which call it together, but for the ledger.

        Raises:
            FloatingPointError: if the last step's gate gradients are not finite, and no scaler
                accounts for it: a run could not go on from there.
        """
        self._run.evidence.settle(self._agreement.pool)
        return self._run.state_dict() | {"learner": self._learner.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restores a run on a pruner made on the dense model: eliminated sections leave it at once.

        Load the weights and make the optimizer afterwards. Costs that were measured are the state's
        from now on, not those that this pruner has measured.

        Raises:
            ValueError: if the state is damaged, or of another format, model or schedule, or this
                pruner has run. Nothing is changed then.
        """
        run = self._run
        run.load_state_dict(state)
        self._learner.load_state_dict(state["learner"])
        gone = run.where("eliminated")
        self._network.detach(gone)
        self._network.remove(gone)
        self._take_gates_off_if_done()

    def keys_gone(self, state: dict) -> set[str]:
        """Keys of the model's `state_dict` that it will lack once it has a run's state.

        Args:
            state: of a run like this one; nothing is changed.

        Raises:
            ValueError: as `load_state_dict`.
        """
        run = self._run
        run.check(state)
        told = zip(run.sections, state["status"], strict=True)
        return branch_keys(self.model, [s for s, status in told if status == "eliminated"])

    def __deepcopy__(self, memo: dict) -> LayerPruner:
        raise TypeError(
            "a pruner cannot be copied: its hooks are on one model. Make another one on a copy of "
            "the dense model, and load this one's state_dict() into it"
        )

    def __str__(self) -> str:
        return table(self.sections, self.left_out, stochastic_depth(self.model))

    def _rows_factor(self, batch_size: int) -> float:
        return float(batch_size) if self.loss_reduction == "mean" else 1.0

    def _take_gates_off_if_done(self) -> None:
        """Ends the gates' own cost with the last decision: the model trains on as a plain one."""
        run = self._run
        if run.phase == "cool-down" and not run.where("open") and not self._ungated:
            self._network.detach(run.where("settled"))
            self._forwards.only_count()
            self._ungated = True

    def _eliminate(self, gone: list[int], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        run = self._run
        self._network.detach(gone)
        for index in gone:
            run.status[index] = "eliminated"
            run.bank.theta[index] = 0.0
        self._network.remove(gone, optimizers)
        self._learner.weaken()
