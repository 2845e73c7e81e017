"""The processes that train one model together, and how they come to know the same.

Decisions fall on the host of every rank, from the same numbers. They travel by a gloo group of
their own: no accelerator waits for them, and they do not mix with the gradients' collectives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


class FirstRankFailed(RuntimeError):
    """Rank 0 cannot go on, so that no rank can; its own error says why."""


class Ranks:
    """The ranks of the default process group, or the one process there is without.

    Made on all ranks at the same time.

    Attributes:
        count: number of ranks.
        rank: this one's number.
    """

    def __init__(self) -> None:
        self.count = dist.get_world_size() if _joined() else 1
        self.rank = dist.get_rank() if _joined() else 0
        self._group = dist.new_group(backend="gloo") if self.count > 1 else None

    def check(self) -> None:
        """Refuses a process group that came after the ranks were counted.

        Raises:
            RuntimeError: if there are more ranks than were counted.
        """
        if _joined() and dist.get_world_size() != self.count:
            raise RuntimeError(
                f"torch.distributed has {dist.get_world_size()} ranks, but the pruner was made for "
                f"{self.count}: call torch.distributed.init_process_group before making it"
            )

    def check_alike(self, names: Sequence[str]) -> None:
        """Refuses ranks whose models differ, which would send each other what does not fit.

        Args:
            names: of this rank's sections.

        Raises:
            RuntimeError: on all ranks, if other ranks have other names.
        """
        name = hashlib.blake2b("\n".join(names).encode(), digest_size=6).hexdigest()
        told = self.gather(torch.tensor([int(name, 16)], device="cpu"))
        if (told != told[0]).any():
            raise RuntimeError(
                f"the ranks' models have other sections than each other; rank {self.rank} found "
                f"{len(names)}: {', '.join(names[:3])}, ... Build the same model on all ranks"
            )

    def gather(self, numbers: Tensor) -> Tensor:
        """What every rank has, in their order; all ranks call it together.

        Args:
            numbers: ``[N]`` on the host, of the same size on all ranks.

        Returns:
            ``[ranks, N]``, the same on all ranks.
        """
        if self.count == 1:
            return numbers[None]
        found = numbers.new_empty(self.count, numbers.shape[0])
        dist.all_gather(list(found.unbind()), numbers, group=self._group)
        return found

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The ranks' mean of each number, the same on all of them; they call it together."""
        return (
            self.gather(torch.tensor(numbers, dtype=torch.float64, device="cpu")).mean(0).tolist()
        )

    def first_alone(self, do: Callable[[], None]) -> None:
        """Lets rank 0 do something before all go on; they call it together.

        Raises:
            FirstRankFailed: on the other ranks, where rank 0 raises an error of its own.
        """
        try:
            if self.rank == 0:
                do()
        except BaseException:
            self.gather(torch.zeros(1, device="cpu"))
            raise
        if not self.gather(torch.ones(1, device="cpu"))[0]:
            raise FirstRankFailed("rank 0 failed")
