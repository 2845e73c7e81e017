"""How many images of ImageNet's size a second the training program reads, on the processor alone.

    python benchmarks/loading.py --output benchmarks/results/loading-cpu.json

Makes a folder of JPEGs of 500 x 375 pixels, whose spectrum and size in bytes are about those of
photographs, and fetches an epoch of it as the recipe imagenet-resnet50 does: from the page cache,
with nothing else to do. Then times the two parts of an image that cost most.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from machine import facts, write_result
from PIL import Image
from torchvision.transforms import v2

from layerprune.training import data, recipe
from layerprune.training.sampling import train_loader

WIDTH, HEIGHT = 500, 375
QUALITY = 88
"""Gives files of ImageNet's mean size, some 110 kB."""
PICTURES = 64
"""Different ones; further files are links to them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=2048, help="of an epoch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2, help="of which the best counts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's process
    chosen = recipe.load("imagenet-resnet50")
    files = [jpeg(seed) for seed in range(PICTURES)]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), files, options.images)
        splits = data.load(chosen.dataset, folder, augment=chosen.augment)
        rounds = [
            [loading(splits, chosen.batch_size, workers) for workers in options.workers]
            for _ in range(options.rounds)
        ]
    result = {
        **facts("cpu"),
        "cores": os.cpu_count(),
        "image": {"width": WIDTH, "height": HEIGHT, "mean_bytes": sum(map(len, files)) / PICTURES},
        "batch_size": chosen.batch_size,
        "images": options.images,
        "rows": [
            max(rows, key=lambda row: row["images_per_second"])
            for rows in zip(*rounds, strict=True)
        ],
        "parts": [
            {"part": name, "cpu_ms": least_ms(function, files)}
            for name, function in parts().items()
        ],
    }
    result["versions"] |= {"torchvision": torchvision.__version__, "pillow": Image.__version__}
    for row in result["rows"] + result["parts"]:
        print(row)
    if options.output is not None:
        write_result(options.output, result)


def jpeg(seed: int) -> bytes:
    """A picture with the 1/f amplitudes of photographs, in brightness much more than in colour."""
    rng = np.random.default_rng(seed)
    vertical = np.fft.fftfreq(HEIGHT)[:, None]
    frequency = np.hypot(vertical, np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = np.inf

    def noise() -> np.ndarray:
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phases / frequency, s=(HEIGHT, WIDTH))
        return plane / plane.std()

    brightness = noise()
    colours = np.stack([127 + 55 * brightness + 15 * noise() for _ in range(3)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_folder(root: Path, files: list[bytes], images: int) -> None:
    """A data set of so many images in one class, and a validation part that nobody reads."""
    for part in ("train", "val"):
        (root / part / "n00000000").mkdir(parents=True)
    for number in range(images):
        path = root / "train" / "n00000000" / f"{number}.JPEG"
        if number < len(files):
            path.write_bytes(files[number])
        else:
            path.hardlink_to(path.with_name(f"{number % len(files)}.JPEG"))
    (root / "val" / "n00000000" / "0.JPEG").write_bytes(files[0])


def loading(splits: data.DataSplits, batch_size: int, workers: int) -> dict:
    """An epoch: images a second of the clock, and what an image costs the processor.

    The start of the processes is in both, as it is in an epoch's.
    """
    cpu, start = cpu_seconds(), time.perf_counter()
    batches = iter(
        train_loader(splits, batch_size, seed=0, epoch=0, workers=workers, drop_last=True)
    )
    started = time.perf_counter() - start
    count = sum(len(labels) for _, labels in batches)
    seconds = time.perf_counter() - start
    return {
        "workers": workers,
        "images_per_second": count / seconds,
        "cpu_ms": 1e3 * (cpu_seconds() - cpu) / count,
        "start_seconds": started,
    }


def cpu_seconds() -> float:
    """Of this process and of those it started that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def parts() -> dict[str, Callable[[bytes], object]]:
    """What an image costs most for."""
    crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    opened = Image.open(io.BytesIO(jpeg(0))).convert("RGB")

    return {
        "decode": lambda file: Image.open(io.BytesIO(file)).convert("RGB"),
        "crop, resize, mirror": lambda file: crop(opened),
    }


def least_ms(function: Callable[[bytes], object], files: list[bytes], rounds: int = 5) -> float:
    """CPU milliseconds of one call, the least of several rounds over the files."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for file in files:
            function(file)
        times.append((time.process_time() - start) / len(files))
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
