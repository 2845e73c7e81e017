"""layerprune: networks that find out while they train which of their layers they do not need."""

from layerprune.compaction import eliminate_sections, verify
from layerprune.config import PruneConfig
from layerprune.pruner import LayerPruner, StepReport
from layerprune.sections import GatedResidual, find_sections

__version__ = "0.1.0"

__all__ = [
    "GatedResidual",
    "LayerPruner",
    "PruneConfig",
    "StepReport",
    "__version__",
    "eliminate_sections",
    "find_sections",
    "verify",
]
