"""What of Lightning a model can be pruned with."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)


def check_supported(trainer: Trainer, pl_module: LightningModule, module: str) -> None:
    """Refuses a training that a model cannot be pruned in.

    Args:
        trainer: about to fit.
        pl_module: what it fits.
        module: name of the part to prune; ``""`` for all of it.

    Raises:
        ValueError: for manual optimization, a strategy that shards, or weight averaging.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            "LayerPruning needs automatic optimization: where the training_step steps the "
            "optimizer itself, make a LayerPruner and call its step there"
        )
    # Not by isinstance: strategies that shard derive from DDP's.
    if type(trainer.strategy) not in _STRATEGIES:
        raise ValueError(
            f"LayerPruning does not work with {type(trainer.strategy).__name__}: use "
            f"{' or '.join(kind.__name__ for kind in _STRATEGIES)}"
        )
    if isinstance(trainer.strategy, DDPStrategy) and not module:
        raise ValueError(
            "under DDP Lightning calls the LightningModule for every training_step: keep the "
            "network in an attribute and name it in `module`"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} averages weights of a model that loses sections: "
                "leave one of the two callbacks out"
            )
