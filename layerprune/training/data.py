"""The data sets the training program knows, by name.

==============  ===================  =========================================================
name            images               training augmentation
==============  ===================  =========================================================
digits          8x8, grey            pad 1, random crop
mnist           28x28, grey          zero-pad 2, random crop
fashion-mnist   28x28, grey          zero-pad 2, random crop, random mirror image
cifar10         32x32, colour        zero-pad 4, random crop, random mirror image (He et al. 2015)
imagefolder     224x224, colour      random resized crop to 224, random mirror image
==============  ===================  =========================================================

``digits`` comes with scikit-learn and needs no folder. The others are read from a folder through
torchvision's own readers; nothing is ever downloaded. Test images are not augmented; those of
``imagefolder`` are resized to 256 (shorter side) and cropped to the central 224.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms import v2

from layerprune.training.formats import (
    Labelled,
    read_cifar10,
    read_idx_folder,
    read_image_folders,
)
from layerprune.training.images import CropFlip, DataError, FileImages, PixelImages

__all__ = ["NAMES", "DataError", "DataSplits", "load"]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "imagefolder")


@dataclass(frozen=True)
class DataSplits:
    """A data set, divided.

    Attributes:
        train: Training images; augmented when fetched by `train_loader`.
        test: Test images.
        num_classes: Labels are 0 .. num_classes - 1.
        in_channels: 1 (grey) or 3 (red, green, blue).
        image_size: Height and width in pixels.
        mean: Mean of each channel that was subtracted, on the scale 0..1.
        std: Standard deviation of each channel that was divided by, on the scale 0..1.
        name: The name the set was loaded by.
    """

    train: PixelImages | FileImages
    test: PixelImages | FileImages
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str


def load(
    name: str,
    root: str | Path | None = None,
    *,
    train_subset: int | None = None,
    augment: bool = True,
) -> DataSplits:
    """Load a data set.

    Args:
        name: One of `NAMES`.
        root: The folder that holds it (not used by ``digits``). ``mnist`` and ``fashion-mnist``:
            the four IDX files, plain or gzipped, in the folder itself or where torchvision keeps
            them (``MNIST/raw``, ``FashionMNIST/raw``). ``cifar10``: the folder
            ``cifar-10-batches-py``. ``imagefolder``: folders ``train`` and ``val``, each with one
            folder of images per class.
        train_subset: Train on this many images only. They are the same ones in every run, larger
            subsets contain smaller ones, and each class has its share.
        augment: Whether training images are augmented (see the table above).

    Returns:
        The training and test sets and what describes them.

    Raises:
        DataError: The name is unknown; the folder or a file is missing or damaged; there are
            fewer than ``train_subset`` training images.
    """
    if name not in NAMES:
        raise DataError(f"unknown data set {name!r}; the data sets are {', '.join(NAMES)}")
    if name == "digits":
        return _digits(train_subset, augment)
    if root is None:
        raise DataError(f"data set {name} needs the folder that holds it, got none")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"the folder of data set {name} does not exist: {root}")
    if name == "imagefolder":
        return _imagefolder(root, train_subset, augment)
    known = _IN_FILES[name]
    return _in_memory(
        name,
        *known.read(root),
        train_subset=train_subset,
        maximum=255,
        mean=known.mean,
        std=known.std,
        augmentation=known.augmentation if augment else None,
    )


@dataclass(frozen=True)
class _Known:
    """What is fixed about a set in files: its reader, channel statistics and augmentation."""

    read: Callable[[Path], tuple[Labelled, Labelled]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: CropFlip


# Mean and standard deviation of all training pixels, as customary for these sets.
_IN_FILES = {
    "mnist": _Known(partial(read_idx_folder, "MNIST"), (0.1307,), (0.3081,), CropFlip(2, False)),
    "fashion-mnist": _Known(
        partial(read_idx_folder, "FashionMNIST"), (0.2860,), (0.3530,), CropFlip(2, True)
    ),
    "cifar10": _Known(
        read_cifar10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), CropFlip(4, True)
    ),
}


def _stratified_subset(labels: Sequence[int], count: int | None) -> list[int]:
    """The first ``count`` indices of a fixed order in which every prefix has all classes' shares.

    Within its class each image gets a random rank; the order is by rank / size of the class.
    """
    if count is None:
        return list(range(len(labels)))
    if not 1 <= count <= len(labels):
        raise DataError(
            f"train_subset must be between 1 and {len(labels)}, the number of training images, "
            f"got {count}"
        )
    classes = np.asarray(labels)
    rank = np.empty(len(classes))
    generator = np.random.default_rng(0)  # fixed, so that runs of all seeds see the same images
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        rank[members] = generator.permutation(len(members)) / len(members)
    return np.argsort(rank, kind="stable")[:count].tolist()


def _in_memory(
    name: str,
    train: Labelled,
    test: Labelled,
    *,
    train_subset: int | None,
    maximum: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augmentation: CropFlip | None,
) -> DataSplits:
    chosen = _stratified_subset(train[1].tolist(), train_subset)
    scale = {"maximum": maximum, "mean": mean, "std": std}
    return DataSplits(
        train=PixelImages(train[0][chosen], train[1][chosen], augmentation=augmentation, **scale),
        test=PixelImages(*test, **scale),
        num_classes=10,
        in_channels=train[0].shape[1],
        image_size=train[0].shape[2],
        mean=mean,
        std=std,
        name=name,
    )


def _digits(train_subset: int | None, augment: bool) -> DataSplits:
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    # The same 360 test images in every run, whatever its seed.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=bunch.target, random_state=0
    )
    scaled = pixels[train].double() / 16
    return _in_memory(
        "digits",
        (pixels[train], labels[train]),
        (pixels[test], labels[test]),
        train_subset=train_subset,
        maximum=16,
        mean=(scaled.mean().item(),),
        std=(scaled.std(correction=0).item(),),
        augmentation=CropFlip(1, False) if augment else None,
    )


def _imagefolder(root: Path, train_subset: int | None, augment: bool) -> DataSplits:
    train, test = read_image_folders(root)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as customary
    scale = {"mean": mean, "std": std}
    plain = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    augmentation = v2.Compose(
        [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    return DataSplits(
        train=FileImages(
            train,
            _stratified_subset(train.targets, train_subset),
            plain=plain,
            augmentation=augmentation if augment else None,
            **scale,
        ),
        test=FileImages(test, range(len(test)), plain=plain, **scale),
        num_classes=len(train.classes),
        in_channels=3,
        image_size=224,
        mean=mean,
        std=std,
        name="imagefolder",
    )
