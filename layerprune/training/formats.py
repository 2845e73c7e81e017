"""Reading the file formats of image data sets, with one clear error for whatever is wrong.

The parsing itself is torchvision's. What is added: gzipped IDX files (which torchvision's readers
do not open, only its downloader does), a folder that holds the files directly, and errors that
name the path and say what to do.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from layerprune.training.images import DataError

__all__ = ["Labelled", "read_cifar10", "read_idx_folder", "read_image_folders"]

Labelled = tuple[Tensor, Tensor]
"""Pixels, uint8 ``[N, C, H, W]``, and labels, int64 ``[N]``."""

_IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_IDX_SIZE, _IDX_CLASSES = 28, 10

# What torchvision's readers raise on a file that is short, long, or of another format.
_PARSE_ERRORS = (AssertionError, KeyError, RuntimeError, TypeError, ValueError)
_UNPACK_ERRORS = (OSError, EOFError, zlib.error)


def read_idx_folder(folder_name: str, root: Path) -> tuple[Labelled, Labelled]:
    """Read the training and test sets of MNIST or of a set in its format.

    Args:
        folder_name: torchvision's name for the set's folder: the files are looked for in ``root``
            and in ``root/folder_name/raw``.
        root: A folder that exists.

    Returns:
        The training set and the test set, each of 28x28 grey images in 10 classes.

    Raises:
        DataError: A file is missing, damaged, or does not fit the others.
    """
    places = (root, root / folder_name / "raw")
    holding = [p for p in places if any(_idx_path(p, name) for name in _IDX_FILES)]
    if not holding:
        raise DataError(
            f"no {folder_name} files in {places[0]} nor in {places[1]}: put "
            f"{', '.join(_IDX_FILES)} (each plain or .gz) into one of them"
        )
    train_images, train_labels, test_images, test_labels = (
        _idx_path(holding[0], name, required=True) for name in _IDX_FILES
    )
    return _idx_pair(train_images, train_labels), _idx_pair(test_images, test_labels)


def _idx_path(folder: Path, name: str, *, required: bool = False) -> Path | None:
    """The file of this name, plain before gzipped; None, or an error, where there is none."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    if required:
        raise DataError(f"missing file {folder / name} (or the same with .gz): put it there")
    return None


def _idx_pair(images_path: Path, labels_path: Path) -> Labelled:
    images = _read_idx(images_path, read_image_file)
    labels = _read_idx(labels_path, read_label_file)
    if images.shape[1:] != (_IDX_SIZE, _IDX_SIZE):
        raise DataError(
            f"{images_path} holds images of {tuple(images.shape[1:])} pixels where "
            f"{_IDX_SIZE}x{_IDX_SIZE} are needed: get the file anew"
        )
    if not 0 < len(images) == len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels, "
            "where the same number, at least one, is needed: get both files anew"
        )
    if labels.max() >= _IDX_CLASSES:
        raise DataError(
            f"{labels_path} holds the label {int(labels.max())} where 0 to {_IDX_CLASSES - 1} "
            "are needed: get the file anew"
        )
    return images.unsqueeze(1), labels


def _read_idx(path: Path, reader: Callable[[str], Tensor]) -> Tensor:
    try:
        if path.suffix != ".gz":
            return reader(str(path))
        with tempfile.TemporaryDirectory() as folder:
            unpacked = Path(folder, path.stem)
            with gzip.open(path) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target)
            return reader(str(unpacked))
    except _UNPACK_ERRORS as error:
        raise DataError(f"cannot read {path} ({error}): get the file anew") from error
    except _PARSE_ERRORS as error:
        raise DataError(
            f"{path} is damaged or not an IDX file of {reader.__name__.split('_')[1]}s "
            f"({type(error).__name__}: {error}): get the file anew"
        ) from error


def read_cifar10(root: Path) -> tuple[Labelled, Labelled]:
    """Read the training and test sets of CIFAR-10, Python version, checksums verified.

    Args:
        root: The folder that holds ``cifar-10-batches-py``.

    Returns:
        The training set and the test set, each of 32x32 colour images in 10 classes.

    Raises:
        DataError: A file is missing or its checksum is not that of CIFAR-10.
    """
    folder = root / CIFAR10.base_folder
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: unpack {CIFAR10.filename} (from {CIFAR10.url}) in {root}"
        )
    files = [
        *CIFAR10.train_list,
        *CIFAR10.test_list,
        (CIFAR10.meta["filename"], CIFAR10.meta["md5"]),
    ]
    # The files are pickles, which can run code when loaded: the checksums come first.
    for name, checksum in files:
        path = folder / name
        if not path.is_file():
            raise DataError(f"missing file {path}: unpack {CIFAR10.filename} in {root} again")
        if not check_integrity(path, checksum):
            raise DataError(
                f"{path} is damaged or not of CIFAR-10 (its MD5 sum is not {checksum}): "
                f"unpack {CIFAR10.filename} in {root} again"
            )
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (CIFAR10(root, train=True), CIFAR10(root, train=False))
    )
    return train, test


def read_image_folders(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """Find the images of ``root/train`` and ``root/val``, one folder per class.

    Args:
        root: A folder that exists.

    Returns:
        The training set and the test set, without transforms.

    Raises:
        DataError: A folder is missing, has no class or a class without images, or the two do not
            have the same classes.
    """
    parts = []
    for name in ("train", "val"):
        folder = root / name
        if not folder.is_dir():
            raise DataError(
                f"missing folder {folder}: {root} must hold train and val, each with one folder "
                "of images per class"
            )
        try:
            parts.append(ImageFolder(folder))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder} must hold one folder per class with at least one image in each ({error})"
            ) from error
    train, test = parts
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"{root}/train and {root}/val must have the same classes; only one of them has "
            f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}"
        )
    return train, test
