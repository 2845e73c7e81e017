"""What a run has spent, against what the dense run would have spent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

BACKWARD = 2.0
"""Operations of a backward pass for one of the forward: two products for each one."""


@dataclass
class Ledger:
    """Floating-point operations and the pruner's own time.

    Attributes:
        train_flops: operations of training, decision tests included.
        dense_train_flops: operations the same batches would have taken without gates.
        test_flops: operations of the decision tests alone.
        draw_seconds: time spent drawing gates.
        step_seconds: time spent in `LayerPruner.step`.
        test_seconds: time spent in the decision tests' forwards.
    """

    train_flops: float = 0.0
    dense_train_flops: float = 0.0
    test_flops: float = 0.0
    draw_seconds: float = 0.0
    step_seconds: float = 0.0
    test_seconds: float = 0.0

    @property
    def fraction(self) -> float:
        """Training operations as a share of the dense run's."""
        return self.train_flops / self.dense_train_flops if self.dense_train_flops else 1.0

    @property
    def test_fraction(self) -> float:
        """The decision tests' operations as a share of the dense run's."""
        return self.test_flops / self.dense_train_flops if self.dense_train_flops else 0.0

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the wall time of the block to ``draw``, ``step`` or ``test``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"{what}_seconds"
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def as_dict(self) -> dict[str, float]:
        """All entries and the two shares."""
        return asdict(self) | {"fraction": self.fraction, "test_fraction": self.test_fraction}
