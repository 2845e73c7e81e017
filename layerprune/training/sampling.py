"""Loaders whose batches depend on nothing but (seed, epoch).

A training loader built twice with the same ``(seed, epoch)`` gives bit-equal batches, whatever was
drawn in between, however many workers fetch, and from whichever batch it starts: a run that is
resumed in the middle of an epoch sees exactly what the uninterrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from layerprune.training.data import DataSplits
from layerprune.training.images import FileImages, PixelImages, Stream, derived_seed
from layerprune.training.interrupt import deaf_children, leave_group

__all__ = ["test_loader", "train_loader"]


class _Epoch(Dataset):
    """An image set as a loader sees it in one epoch: an index is a whole batch of indices."""

    def __init__(self, images: PixelImages | FileImages, draws: Any) -> None:
        self.images = images
        self.draws = draws

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.images.batch(indices, self.draws)


class _Batches(Sampler):
    """Cuts an order of indices into batches.

    Args:
        order: the indices.
        size: of a batch.
        start: the first batch given.
        every: how many batches further the next one is.
        drop_last: leave out a last batch that is smaller than the others.
        part: (n, of): the n-th of so many equal parts of each batch.
    """

    def __init__(
        self,
        order: list[int],
        size: int,
        *,
        start: int = 0,
        every: int = 1,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.order = order
        self.size = size
        self.part = part
        self.stop = len(order) // size if drop_last else -(-len(order) // size)
        self.batches = range(start, self.stop, every)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        number, parts = self.part
        for batch in self.batches:
            rows = self.order[batch * self.size : (batch + 1) * self.size]
            yield rows[len(rows) * number // parts : len(rows) * (number + 1) // parts]


class _Loader(DataLoader):
    """A loader whose processes leave it to the one that trains to stop."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with deaf_children():
            return super().__iter__()


def _loader(epoch: _Epoch, batches: _Batches, workers: int, pin_memory: bool) -> DataLoader:
    return _Loader(
        epoch,
        sampler=batches,
        batch_size=None,  # the sampler's items are batches already
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_group,
        # The loader draws a seed for its workers, which nothing here uses. Not from the default
        # generator: that belongs to the model, and a resumed run makes one loader more.
        generator=torch.Generator(),
    )


def _check(**least: tuple[int, int]) -> None:
    """Refuse an argument that is below its least value; given as name=(value, least value)."""
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def train_loader(
    splits: DataSplits,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
    part: tuple[int, int] = (0, 1),
) -> DataLoader:
    """One epoch of shuffled, augmented training batches.

    Args:
        splits: The data set.
        batch_size: Images per batch.
        seed: The run's seed, >= 0.
        epoch: Which epoch, >= 0; each has its own order and augmentation.
        start_batch: The first batch to give: those before it are left out, those after it are as
            if they had not been. May equal the number of batches (nothing is left to give).
        workers: Processes that fetch; 0 fetches in the calling process. Changes no batch.
        drop_last: Leave out a last batch that is smaller than the others.
        pin_memory: Copy batches into pinned memory, for transfers to a GPU.
        part: (n, of): give the n-th, from 0, of so many contiguous parts of each batch, as equal
            as can be.

    Returns:
        A loader of float32 images ``[B, C, H, W]`` and int64 labels ``[B]``; its ``len`` is the
        number of batches from ``start_batch`` on.

    Raises:
        ValueError: An argument is out of its range, or the epoch has no batch at all.
    """
    _check(batch_size=(batch_size, 1), seed=(seed, 0), epoch=(epoch, 0), workers=(workers, 0))
    count = len(splits.train)
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch, Stream.ORDER))
    order = torch.randperm(count, generator=generator).tolist()
    batches = _Batches(order, batch_size, start=start_batch, drop_last=drop_last, part=part)
    if batches.stop == 0:
        raise ValueError(
            f"batch_size {batch_size} with drop_last leaves no batch of the {count} training "
            "images: choose a smaller batch_size"
        )
    if not 0 <= start_batch <= batches.stop:
        raise ValueError(
            f"start_batch must be between 0 and {batches.stop}, the batches of an epoch, "
            f"got {start_batch}"
        )
    draws = splits.train.draws(seed, epoch)
    return _loader(_Epoch(splits.train, draws), batches, workers, pin_memory)


def test_loader(
    splits: DataSplits,
    batch_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    start: int = 0,
    every: int = 1,
) -> DataLoader:
    """The test images once, in their own order, without augmentation.

    Args:
        splits: The data set.
        batch_size: Images per batch; the last one may be smaller.
        workers: Processes that fetch; 0 fetches in the calling process.
        pin_memory: Copy batches into pinned memory, for transfers to a GPU.
        start: The first batch to give.
        every: Give each so many-th batch from there on.

    Returns:
        A loader of float32 images ``[B, C, H, W]`` and int64 labels ``[B]``.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check(batch_size=(batch_size, 1), workers=(workers, 0))
    order = list(range(len(splits.test)))
    batches = _Batches(order, batch_size, start=start, every=every)
    return _loader(_Epoch(splits.test, None), batches, workers, pin_memory)
