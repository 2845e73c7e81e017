"""What happens at a model's forward in training mode: the draw, a decision test, the accounting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from layerprune import ops
from layerprune.calls import batch_size_of
from layerprune.difference import OutputPath, PendingMeasurement
from layerprune.evidence import EVIDENCE_LAG
from layerprune.ledger import BACKWARD
from layerprune.recomputation import is_recomputing
from layerprune.run import RunState
from layerprune.wrapping import check_unwrapped


class Forwards:
    """Hooks on a model's forward.

    Args:
        model: the model.
        run: the run it belongs to.
        rows_factor: what turns dC/d(row) into the derivative of the row's own loss, by batch size.
        model_flops: operations of one row's dense forward.
        branch_flops: each section's share of them.
    """

    def __init__(
        self,
        model: nn.Module,
        run: RunState,
        rows_factor: Callable[[int], float],
        model_flops: float,
        branch_flops: list[float],
    ) -> None:
        self._model = model
        self._run = run
        self._rows_factor = rows_factor
        self._model_flops = model_flops
        self._branch_flops = branch_flops
        self._path: OutputPath | None = None
        self._batch_size = 0
        self._checked = False
        self._is_drawn = False
        self._measured: int | None = None
        self._spent = [0.0] * len(branch_flops)
        from layerprune.hooks import Hook

        self._handles = [
            model.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            model.register_forward_hook(Hook(self._after), with_kwargs=True),
        ]

    def close(self) -> None:
        """Takes the hooks off the model and opens the gates in training mode."""
        for handle in self._handles:
            handle.remove()
        if self._path is not None:
            self._path.abandon()
        self._run.bank.open_all()

    def only_count(self) -> None:
        """Leaves one hook on the model, for the ledger: nothing is drawn or measured any more."""
        self.close()
        from layerprune.hooks import Hook

        self._handles = [self._model.register_forward_pre_hook(Hook(self._count), with_kwargs=True)]

    def measurement(self) -> PendingMeasurement | None:
        """The decision test's measurement since the last call, if there was one."""
        path, self._path = self._path, None
        return None if path is None else path.result()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if is_recomputing():
            self._check_recomputation()
            return
        if not self._checked:
            check_unwrapped(model)  # it may have been sharded since
            self._checked = True
        if self._path is not None and self._path.waiting:
            # The forward that it was begun for raised: what it noted is of another batch.
            self._path.abandon()
            self._path = None
        if self._training():
            if not self._is_drawn:
                self.draw(batch_size_of((args, kwargs)))
            self._is_drawn = False
            self._path = self._path or self._begin_path()

    def _count(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._training() and torch.is_grad_enabled() and not is_recomputing():
            self.draw(batch_size_of((args, kwargs)))
        self._is_drawn = False

    def _training(self) -> bool:
        """Whether some section is in training mode; without any, the model."""
        alive = [
            section.module.training
            for section, status in zip(self._run.sections, self._run.status, strict=True)
            if status != "eliminated"
        ]
        return any(alive) if alive else self._model.training

    def draw(self, batch_size: int, given: ops.GateDraw | None = None) -> None:
        """Draws for the next forward in training mode, which then does not.

        Args:
            batch_size: rows of its batch.
            given: the gates to use, but in a section that is measured; None to draw them.
        """
        self._batch_size = batch_size
        self._is_drawn = True
        recording = torch.is_grad_enabled()
        self._measured = self._candidate() if recording and self._path is None else None
        running = self._draw(recording, given)
        if recording:
            if self._run.where("open"):
                self._run.bank.log.begin(self._run.bank.gates)
            self._account(running)

    def _check_recomputation(self) -> None:
        """Refuses to repeat a forward that nobody recorded."""
        if self._model.training and self._run.where("open") and not self._run.bank.log:
            raise RuntimeError(
                "the model is run again in a backward, after a forward without a graph: a "
                "checkpoint around the whole model needs use_reentrant=False"
            )

    def _begin_path(self) -> OutputPath | None:
        run, index = self._run, self._measured
        self._measured = None
        if index is None:
            return None
        first, total = run.bank.rows_here(self._batch_size)
        return OutputPath(
            index,
            run.bank.gates[index],
            run.bank.gates,
            self._model,
            trained_on=self._nearest_end(index) == 1.0,
            rng=(run.bank.seed, run.bank.draw_number),
            rows=(first, first + self._batch_size, total),
            rows_factor=self._rows_factor(self._batch_size),
        )

    def _candidate(self) -> int | None:
        """The section to measure in this forward."""
        run = self._run
        learning = run.phase == "learning"
        if run.phase == "warm-up" or (learning and run.config.rule != "test"):
            return None
        if run.step_count + EVIDENCE_LAG >= run.schedule.total_steps:
            return None  # nobody would hear of it
        awaited = run.evidence.measurements_of(run.judge.current)
        return run.judge.choose(run.step_count, run.bank.theta, run.status, learning, awaited)

    def _nearest_end(self, index: int) -> float:
        return 1.0 if float(self._run.bank.theta[index]) >= 0.5 else 0.0

    def _draw(self, recording: bool, given: ops.GateDraw | None) -> list[int]:
        """Hands the gates their draws; returns the rows on which each branch runs."""
        run = self._run
        if not run.where("open"):
            run.bank.open_all()
            return [self._batch_size] * len(run.sections)
        index = self._measured
        forced = {} if index is None else {index: self._nearest_end(index)}
        with run.ledger.timed("draw"):
            return run.bank.draw(
                self._batch_size,
                skip=frozenset(i for i, status in enumerate(run.status) if status != "open"),
                forced=forced,
                record=recording,
                device=next(self._model.parameters()).device,
                given=given,
            )

    def _account(self, running: list[int]) -> None:
        run = self._run
        self._spent = [
            0.0 if status == "eliminated" else flops * rows
            for flops, rows, status in zip(self._branch_flops, running, run.status, strict=True)
        ]
        spent = self._fixed_flops() + sum(self._spent)
        run.ledger.train_flops += (1 + BACKWARD) * spent
        run.ledger.dense_train_flops += (1 + BACKWARD) * self._batch_size * self._model_flops

    def _fixed_flops(self) -> float:
        return self._batch_size * (self._model_flops - sum(self._branch_flops))

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        run, path = self._run, self._path
        if is_recomputing():
            return None
        if not self._is_drawn:  # else what was drawn is for a forward to come
            run.bank.log.end()
        if path is None or not path.waiting:
            return None
        with run.ledger.timed("test"):
            mixed = path.finish(model, args, kwargs, output)
        replayed = path.replayed()
        spent = self._fixed_flops()
        for index, gate in enumerate(run.bank.gates):
            if index == path.index:
                spent += 0.0 if path.trained_on else self._branch_flops[index] * self._batch_size
            elif gate not in replayed:
                spent += self._spent[index]
        run.ledger.test_flops += spent
        run.ledger.train_flops += spent
        return mixed
