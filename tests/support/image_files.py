"""Small data sets in the files that the real ones come in."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
from PIL import Image

TRAIN, TEST = 40, 20
CIFAR_FOLDER = "cifar-10-batches-py"


def idx_bytes(array):
    """The IDX format, as on the MNIST page: 0, 0, type 8 (uint8), dimensions, sizes, data."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def idx_files():
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    return arrays


def write_idx(folder, zipped):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in idx_files().items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))


def cifar_part(count, first):
    rng = np.random.default_rng(first)
    labels = [(first + i) % 10 for i in range(count)]
    return {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": labels}


def write_cifar(root):
    """Writes CIFAR-10's layout; returns what torchvision's class says of it, by attribute."""
    folder = root / CIFAR_FOLDER
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    train = [write(f"data_batch_{i + 1}", cifar_part(8, 8 * i)) for i in range(5)]
    test = [write("test_batch", cifar_part(TEST, 99))]
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    return {"train_list": train, "test_list": test, "meta": meta}


def write_folders(root):
    """Two classes of JPEGs, named as ImageNet's are."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for label in ("ant", "bee"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{i}.JPEG")
