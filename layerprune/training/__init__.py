"""The training program: data, loop, checkpoints, records and report of a run."""

from layerprune.training.own_loop import load, restore, save

__all__ = ["load", "restore", "save", "train"]


def __getattr__(name: str) -> object:
    # Checkpoints do without the data sets' and the report's libraries.
    if name == "train":
        from layerprune.training.engine import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
