"""layerprune: networks that find out while they train which of their layers they do not need."""

from layerprune._version import __version__
from layerprune.compaction import eliminate_sections, verify
from layerprune.config import PruneConfig
from layerprune.drop_path import replace_stochastic_depth, stochastic_depth
from layerprune.info import StepReport
from layerprune.ops import backends
from layerprune.pruner import LayerPruner
from layerprune.renumber import renumber
from layerprune.sections import GatedResidual, find_sections, survey

__all__ = [
    "GatedResidual",
    "LayerPruner",
    "PruneConfig",
    "StepReport",
    "__version__",
    "backends",
    "eliminate_sections",
    "export",
    "find_sections",
    "load",
    "renumber",
    "replace_stochastic_depth",
    "restore",
    "save",
    "stochastic_depth",
    "survey",
    "verify",
]


def __getattr__(name: str) -> object:
    # The training program has dependencies that the core does without.
    if name in ("load", "restore", "save"):
        from layerprune import training

        return getattr(training, name)
    if name == "export":
        from layerprune.training.export import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
