"""`LayerPruning`: the pruner as a callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layerprune.calls import Inputs
from layerprune.info import absent
from layerprune.integrations.lightning_support import check_supported
from layerprune.integrations.steps import StepFollower, check_options, metrics
from layerprune.pruner import LayerPruner

__all__ = ["LayerPruning"]


class LayerPruning(Callback):
    """Prunes a part of a LightningModule while it is trained.

    Use it as any callback::

        pruning = LayerPruning(module="model", example_inputs=x, strength=0.01)
        Trainer(max_epochs=10, callbacks=[pruning]).fit(net, loader)

    The module is plain again when ``fit`` ends. Checkpoints hold the pruner's state: give
    ``ckpt_path`` along with a module freshly made, and this callback, to ``fit``, ``validate``,
    ``test`` or ``predict``.

    Args:
        module: the attribute of the LightningModule that ``training_step`` calls and that is
            pruned, such as ``"model"``; ``""`` for the LightningModule itself, if its
            ``training_step`` calls ``self(...)``.
        example_inputs: what ``module`` is called with; None for the LightningModule's
            ``example_input_array``.
        options: further arguments of `LayerPruner`, of which ``strength`` must be given.

    Attributes:
        pruner: the pruner, from the start of ``fit``; still there when it has ended.

    Raises:
        TypeError: for an unknown option, or without ``strength``.
    """

    def __init__(
        self, *, module: str = "model", example_inputs: Inputs | None = None, **options: Any
    ) -> None:
        check_options(options)
        self.module = module
        self.example_inputs = example_inputs
        self.options = options
        self.pruner: LayerPruner | None = None
        self._stripped = False
        self._evaluating = False
        self._steps: StepFollower | None = None
        self._global_step = 0

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be pruned, and prepares for a checkpoint.

        Raises:
            ValueError: for manual optimization, a strategy that shards, or weight averaging.
        """
        if stage == "fit":
            check_supported(trainer, pl_module, self.module)
        restored = pl_module.on_load_checkpoint

        # A callback's own hooks come when the weights are loaded: the module must have lost its
        # eliminated sections by then. A function: it may be copied along with the module.
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._restore(pl_module, checkpoint, stage)
            restored(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the pruner, if no checkpoint brought one, and follows the optimizer.

        Raises:
            ValueError: if the number of steps is unknown, or not that of the run to go on with.
        """
        model = self._find(pl_module)
        total_steps = trainer.estimated_stepping_batches
        if not isinstance(total_steps, int) or total_steps < 0:
            raise ValueError(
                "the number of training steps is unknown, and the pruner's phases follow from it: "
                "give the Trainer max_steps, or max_epochs and a loader that has a length"
            )
        if self.pruner is None or self._stripped or self.pruner.model is not model:
            self._make(pl_module, total_steps)
        elif self.pruner.total_steps != total_steps:
            raise ValueError(
                f"the run to go on with has {self.pruner.total_steps} steps, this Trainer makes "
                f"{total_steps}: give it the same epochs, batches and accumulation"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._steps = StepFollower(self.pruner, trainer.optimizers[0], scaler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that trainer and pruner are at the same step.

        Raises:
            RuntimeError: if they are not.
        """
        self._global_step = trainer.global_step
        if self.pruner.step_count != self._global_step:
            raise RuntimeError(
                f"the trainer is at step {self._global_step}, the pruner at "
                f"{self.pruner.step_count}: begin with a new Trainer and a module freshly made, or "
                "go on from a checkpoint"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes what the loss will be divided by."""
        self._steps.accumulation = trainer.accumulate_grad_batches

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the pruner's step where the batch ended an optimizer's, and logs.

        Raises:
            RuntimeError: if the batch did not pass through the pruned module.
        """
        if trainer.global_step == self._global_step:
            return  # gradients are accumulated
        self._global_step = trainer.global_step
        report = self._steps.finish()
        if report.changed and isinstance(trainer.strategy.model, DistributedDataParallel):
            self.pruner.rewrap(trainer.strategy.model)
        if report.step == 1 and not self.pruner.ledger.dense_train_flops:
            raise RuntimeError(
                f"training_step has not called the pruned module, {self._place()}: name the "
                "attribute that it calls in `module`"
            )
        every = trainer.log_every_n_steps
        if every and self._global_step % every == 0:
            pl_module.log_dict(metrics(self.pruner), on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the module a plain one."""
        self._end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves the module gated, for the checkpoint of a run that is to go on."""
        vars(pl_module).pop("on_load_checkpoint", None)
        self._unfollow()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes a module plain that a checkpoint was evaluated with."""
        vars(pl_module).pop("on_load_checkpoint", None)
        if self._evaluating:
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state and what the module lacks."""
        if self.pruner is None:
            return {}
        return {
            "pruner": self.pruner.state_dict(),
            "structure": self.pruner.structure(),
            "stripped": self._stripped,
        }

    def _place(self) -> str:
        return f"its {self.module!r}" if self.module else "the LightningModule itself"

    def _find(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"{type(pl_module).__name__} has no module {self.module!r}, but {names}: name the "
                "one to prune in `module`"
            ) from error

    def _make(self, pl_module: LightningModule, total_steps: int) -> None:
        inputs = self.example_inputs
        if inputs is None:
            inputs = pl_module.example_input_array
        if inputs is None:
            raise ValueError(
                "give example_inputs, or set the LightningModule's example_input_array: what the "
                "pruned module is called with"
            )
        self.pruner = LayerPruner(
            self._find(pl_module), example_inputs=inputs, total_steps=total_steps, **self.options
        )
        self._stripped = False

    def _restore(self, pl_module: LightningModule, checkpoint: dict, stage: str) -> None:
        """Gives a module the structure of a checkpoint, ahead of its weights."""
        fitting = stage == "fit"
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            if fitting:
                raise ValueError(
                    "the checkpoint was made without LayerPruning: load its weights into the "
                    "module, and fit without ckpt_path"
                )
            return
        if self.pruner is not None and self.pruner.model is self._find(pl_module):
            here, there = absent(self.pruner.structure()), state["structure"]
            if fitting or not here == absent(there) == there["eliminated"]:
                raise ValueError(
                    f"the module has lost {len(here)} sections in its run, the checkpoint "
                    f"{len(there['eliminated'])}: load it into a module freshly made"
                )
            return
        if fitting and state["stripped"]:
            raise ValueError(
                "the checkpoint was saved after pruning had ended: there is no run to go on with"
            )
        self._make(pl_module, state["pruner"]["total_steps"])
        self.pruner.load_state_dict(state["pruner"])
        self._evaluating = not fitting
        if state["stripped"]:
            self._end()

    def _unfollow(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _end(self) -> None:
        self._evaluating = False
        self._unfollow()
        if not self._stripped:
            self.pruner.strip()
            self._stripped = True
