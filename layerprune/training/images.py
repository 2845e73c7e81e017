"""Sets of labelled images, fetched a batch at a time, with augmentation fixed by (seed, epoch).

`PixelImages` lies in memory and is fetched, augmented and normalised a whole batch at a time:
torchvision's v2 transforms draw one crop per *call*, so they would have to run image by image,
which for a batch of 128 CIFAR images takes 33 ms where this takes 0.9 ms (one CPU core).
`FileImages` is a folder of files and does run torchvision's transforms image by image, but for the
normalisation: making floats of a whole batch's pixels at once costs less than of each image's.

How an image is augmented is a pure function of (seed, epoch, its index): neither the batch it is
in, nor what was fetched before, nor the process that fetches it has a say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

__all__ = ["CropFlip", "DataError", "FileImages", "PixelImages", "Stream", "derived_seed"]


class Stream(IntEnum):
    """Uses of random numbers under one (seed, epoch), so that none repeats another."""

    ORDER = 0
    PIXELS = 1
    FILES = 2


class DataError(ValueError):
    """A data set is unknown, missing, incomplete or damaged; the message names path and remedy."""


def derived_seed(seed: int, epoch: int, stream: Stream, *sample: int) -> int:
    """A 64-bit seed that is a hash of its arguments (NumPy's SeedSequence); none is negative."""
    sequence = np.random.SeedSequence(seed, spawn_key=(epoch, stream, *sample))
    return int(sequence.generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class CropFlip:
    """Zero-pad, crop back to the original size at a random place, mirror half of the images.

    Attributes:
        padding: Pixels added on every side before the crop: shifts lie in [-padding, padding].
        flip: Whether images are mirrored left to right with probability 1/2.
    """

    padding: int
    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw for ``count`` images: int64 ``[count, 3]`` of (top, left, mirrored 0/1)."""
        corner = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(2 if self.flip else 1, (count, 1), generator=generator)
        return torch.cat([corner, mirrored], dim=1)

    def apply(self, pixels: Tensor, draws: Tensor) -> Tensor:
        """Crop and mirror ``pixels`` ``[B, C, H, W]`` as ``draws`` ``[B, 3]`` says."""
        height, width = pixels.shape[-2:]
        top, left, mirrored = draws.unsqueeze(-1).unbind(1)
        rows = top + torch.arange(height)
        columns = torch.arange(width)
        columns = left + torch.where(mirrored.bool(), columns.flip(0), columns)
        padded = F.pad(pixels, [self.padding] * 4)
        places = rows.unsqueeze(2) * padded.shape[-1] + columns.unsqueeze(1)
        places = places.flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1)
        return padded.flatten(2).gather(2, places).view_as(pixels)


class _Normalisation:
    """From pixels to what a network is given.

    Args:
        maximum: The pixel value that stands for 1.0.
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
    """

    def __init__(self, maximum: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self._shift = torch.tensor(mean).mul(maximum).view(-1, 1, 1)
        self._scale = torch.tensor(std).mul(maximum).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 ``[B, C, H, W]`` to float32 of that shape."""
        return pixels.float().sub_(self._shift).div_(self._scale)


class PixelImages(Dataset):
    """Labelled images in memory, fetched a batch at a time.

    Indexing with an integer gives ``(image, label)`` without augmentation.

    Args:
        pixels: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        maximum: The pixel value that stands for 1.0.
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        augmentation: What `draws` draws, or None for none.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        *,
        maximum: int,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: CropFlip | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.augmentation = augmentation
        self._normalised = _Normalisation(maximum, mean, std)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def draws(self, seed: int, epoch: int) -> Tensor | None:
        """The augmentation of every image in this epoch, for `batch`."""
        if self.augmentation is None:
            return None
        generator = torch.Generator().manual_seed(derived_seed(seed, epoch, Stream.PIXELS))
        return self.augmentation.draw(len(self), generator)

    def batch(self, indices: Sequence[int], draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fetch images: float32 ``[B, C, H, W]``, normalised, and int64 labels ``[B]``.

        Args:
            indices: Which images.
            draws: What `draws` gave for this epoch, or None for no augmentation.
        """
        chosen = torch.as_tensor(indices)
        pixels = self.pixels[chosen]
        if draws is not None and self.augmentation is not None:
            pixels = self.augmentation.apply(pixels, draws[chosen])
        return self._normalised(pixels), self.labels[chosen]


class FileImages(Dataset):
    """Labelled images in files, read one at a time through torchvision's transforms.

    Indexing with an integer gives ``(image, label)`` without augmentation.

    Args:
        folder: The images, without a transform of their own.
        chosen: Indices into ``folder`` of the images that belong to this set.
        plain: Transform of a PIL image to uint8 ``[C, H, W]``, for when nothing is augmented.
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        augmentation: Random transform used in its place in training, or None for none. It must
            draw from torch's default generator, as torchvision's v2 transforms do.
    """

    def __init__(
        self,
        folder: ImageFolder,
        chosen: Sequence[int],
        *,
        plain: Callable[[Any], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.folder = folder
        self.chosen = chosen
        self.plain = plain
        self.augmentation = augmentation
        self._normalised = _Normalisation(255, mean, std)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def draws(self, seed: int, epoch: int) -> tuple[int, int] | None:
        """What `batch` needs to draw the augmentation of this epoch's images."""
        return None if self.augmentation is None else (seed, epoch)

    def batch(
        self, indices: Sequence[int], draws: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fetch images: float32 ``[B, C, H, W]``, normalised, and int64 labels ``[B]``.

        Args:
            indices: Which images.
            draws: What `draws` gave for this epoch, or None for no augmentation.

        Raises:
            DataError: A file is missing or is not a readable image.
        """
        pixels, labels = [], []
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                image, label = self._read(index)
                transform = self.plain
                if draws is not None and self.augmentation is not None:
                    transform = self.augmentation
                    # Not torch.manual_seed: that would also seed the CUDA generators, which the
                    # training program owns and fork_rng(devices=[]) would not restore.
                    seed = derived_seed(*draws, Stream.FILES, index)
                    torch.default_generator.manual_seed(seed)
                pixels.append(transform(image))
                labels.append(label)
        return self._normalised(torch.stack(pixels)), torch.tensor(labels)

    def _read(self, index: int) -> tuple[Any, int]:
        position = self.chosen[index]
        try:
            return self.folder[position]
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise
            path = self.folder.samples[position][0]
            raise DataError(
                f"cannot read the image {path} ({error}); replace or remove it"
            ) from error
