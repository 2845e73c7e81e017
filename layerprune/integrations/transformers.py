"""`LayerPruningCallback`: the pruner as a callback of transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from layerprune.calls import Inputs
from layerprune.depth import note_eliminated
from layerprune.integrations.steps import StepFollower, check_options, metrics
from layerprune.integrations.trainer_checkpoints import load_weights, newest, read, save
from layerprune.integrations.transformers_support import check_supported, first_rows
from layerprune.pruner import LayerPruner

__all__ = ["LayerPruningCallback"]


class LayerPruningCallback(TrainerCallback):
    """Prunes the Trainer's model while it is trained.

    Use it as any callback; `resume` is for checkpoints::

        pruning = LayerPruningCallback(strength=0.01)
        trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[pruning])
        trainer.train(resume_from_checkpoint=pruning.resume(trainer))

    The model is plain again when ``train`` returns; its ``config.layerprune_eliminated`` names the
    sections that it lost, here and in every checkpoint.

    Args:
        example_inputs: what the model is called with; None for the first rows of the train dataset,
            as the Trainer collates them, without labels.
        options: further arguments of `LayerPruner`, of which ``strength`` must be given.

    Attributes:
        pruner: the pruner, from the start of ``train``; still there when it has ended.

    Raises:
        TypeError: for an unknown option, or without ``strength``.
    """

    def __init__(self, *, example_inputs: Inputs | None = None, **options: Any) -> None:
        check_options(options)
        self.example_inputs = example_inputs
        self.options = options
        self.pruner: LayerPruner | None = None
        self._stripped = False
        self._steps: StepFollower | None = None

    def resume(
        self, trainer: Trainer, checkpoint: str | os.PathLike[str] | None = None
    ) -> str | None:
        """Gives the trainer's model the structure that a checkpoint's weights have.

        The Trainer loads weights and makes its optimizer before it calls any callback. Also puts
        this callback ahead of those that report, which then have its metrics.

        Args:
            trainer: made with a dense model and this callback.
            checkpoint: a checkpoint's folder; None for the newest in ``args.output_dir``.

        Returns:
            What to give to ``trainer.train(resume_from_checkpoint=...)``: the folder, or None where
            there is no checkpoint yet.

        Raises:
            ValueError: if the trainer lacks this callback; if the checkpoint lacks the pruner's
                state, or is damaged, or of another model or configuration.
        """
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            raise ValueError("the trainer was made without this callback: give it in `callbacks`")
        callbacks.remove(self)
        callbacks.insert(0, self)
        folder = newest(trainer.args.output_dir) if checkpoint is None else Path(checkpoint)
        if folder is None:
            return None
        state = read(folder)
        self._make(trainer.model, trainer.args, trainer.get_train_dataloader(), state)
        if isinstance(trainer.model, PreTrainedModel):
            load_weights(trainer.model, folder)
        return str(folder)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_dataloader: DataLoader,
        **kwargs: Any,
    ) -> None:
        """Makes the pruner, if `resume` has not, and follows the optimizer.

        Raises:
            ValueError: if the Trainer's settings do not go with pruning.
            RuntimeError: if the Trainer goes on from a checkpoint without `resume`.
        """
        check_supported(args)
        if self.pruner is None or self._stripped or self.pruner.model is not model:
            if state.global_step:
                raise RuntimeError(
                    "the Trainer goes on from a checkpoint, but the pruner does not: call "
                    "trainer.train(resume_from_checkpoint=pruning.resume(trainer)), with a Trainer "
                    "that was given a model, not model_init"
                )
            self._make(model, args, train_dataloader, {"total_steps": state.max_steps})
        if (self.pruner.step_count, self.pruner.total_steps) != (
            state.global_step,
            state.max_steps,
        ):
            raise RuntimeError(
                f"the Trainer is at step {state.global_step} of {state.max_steps}, the pruner at "
                f"{self.pruner.step_count} of {self.pruner.total_steps}: resume from the same "
                "checkpoint, with the same settings"
            )
        wrapped = isinstance(optimizer, AcceleratedOptimizer)
        self._steps = StepFollower(
            self.pruner,
            optimizer.optimizer if wrapped else optimizer,
            optimizer.scaler if wrapped else None,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to count micro-batches: an epoch's last step may have fewer of them."""
        self._steps.accumulation = 1

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts a micro-batch."""
        self._steps.accumulation += 1

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Ends the pruner's step."""
        if self._steps.finish().changed:
            self._note(model, self.pruner.structure()["eliminated"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Adds the pruner's metrics to what was logged in training."""
        if self._steps is not None:
            found = metrics(self.pruner)
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the pruner's state into the checkpoint that the Trainer has just written."""
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        save(folder, self.pruner.state_dict())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Makes the model a plain one."""
        self._steps.close()
        self._steps = None
        self.pruner.strip()
        self._stripped = True

    def _make(
        self, model: nn.Module, args: TrainingArguments, loader: DataLoader, state: Mapping
    ) -> None:
        inputs = self.example_inputs
        if inputs is None:
            inputs = first_rows(loader, model, args)
        self.pruner = LayerPruner(
            model, example_inputs=inputs, total_steps=state["total_steps"], **self.options
        )
        self._stripped = False
        if "step_count" in state:
            self.pruner.load_state_dict(state)

    def _note(self, model: nn.Module, eliminated: list[str]) -> None:
        note_eliminated(model, eliminated, {info.name for info in self.pruner.sections})
