"""The training program: data, loop, checkpoints, records and report of a run."""

from layerprune.training.checkpoint import load_model as load
from layerprune.training.engine import train

__all__ = ["load", "train"]
