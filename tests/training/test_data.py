"""Data sets: files of the real formats, damaged ones, splits, order, augmentation, resume."""

import gzip

import numpy as np
import pytest
import torch
from image_files import TEST, TRAIN, cifar_part, idx_bytes, idx_files, write_idx
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as TF

from layerprune.training import sampling
from layerprune.training.data import NAMES, DataError, load


def batches(splits, **kwargs):
    kwargs = {"batch_size": 16, "seed": 3, "epoch": 2} | kwargs
    return list(sampling.train_loader(splits, **kwargs))


def assert_same(first, second):
    assert len(first) == len(second)
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def pixels_of(splits, x):
    """Undo the normalisation: whole pixel values 0..255."""
    mean = torch.tensor(splits.mean).view(-1, 1, 1)
    std = torch.tensor(splits.std).view(-1, 1, 1)
    values = (x * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().to(torch.uint8)


# --- what is read ---------------------------------------------------------------------------------


def test_digits_split_is_stratified_disjoint_and_complete():
    splits = load("digits")
    assert (len(splits.train), len(splits.test)) == (1437, 360)
    x, y = splits.train.batch(range(1437))
    u, v = splits.test.batch(range(360))
    assert abs(x.mean()) < 1e-5 and abs(x.std(correction=0) - 1) < 1e-5

    bunch = load_digits()
    images = torch.cat([x, u]) * splits.std[0] + splits.mean[0]
    found = sorted(map(tuple, (images * 16).round().flatten(1).int().tolist()))
    assert found == sorted(map(tuple, bunch.data.astype(int).tolist()))
    share = np.bincount(bunch.target) * 360 / 1797
    assert np.abs(np.bincount(v.numpy()) - share).max() < 1
    assert torch.equal(torch.cat([y, v]).bincount(), torch.from_numpy(bunch.target).bincount())


@pytest.mark.parametrize(
    ("name", "folder", "zipped"),
    [
        ("mnist", ".", False),
        ("mnist", "MNIST/raw", False),
        ("fashion-mnist", ".", True),
        ("fashion-mnist", "FashionMNIST/raw", True),
    ],
)
def test_idx_files_plain_or_gzipped_here_or_where_torchvision_has_them(
    tmp_path, name, folder, zipped
):
    write_idx(tmp_path / folder, zipped)
    splits = load(name, tmp_path)
    for part, images in (("train", splits.train), ("t10k", splits.test)):
        x, y = images.batch(range(len(images)))
        assert x.shape[1:] == (splits.in_channels, splits.image_size, splits.image_size)
        expected = idx_files()[f"{part}-images-idx3-ubyte"]
        assert np.array_equal(pixels_of(splits, x)[:, 0].numpy(), expected)
        assert np.array_equal(y.numpy(), idx_files()[f"{part}-labels-idx1-ubyte"])
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 1, 28)


def test_cifar10_pickles(cifar_root):
    splits = load("cifar10", cifar_root)
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 3, 32)
    x, y = splits.train.batch(range(40))
    expected = np.concatenate([cifar_part(8, 8 * i)["data"] for i in range(5)])
    assert np.array_equal(pixels_of(splits, x).flatten(1).numpy(), expected)
    assert y.tolist() == [label for i in range(5) for label in cifar_part(8, 8 * i)["labels"]]
    u, _ = splits.test.batch(range(TEST))
    assert np.array_equal(pixels_of(splits, u).flatten(1), cifar_part(TEST, 99)["data"])


def test_image_folders(folder_root):
    splits = load("imagefolder", folder_root)
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (2, 3, 224)
    assert (len(splits.train), len(splits.test)) == (10, 4)
    (x, y), *rest = sampling.test_loader(splits, 3)
    assert x.shape == (3, 3, 224, 224) and x.dtype == torch.float32
    assert torch.cat([y, *(v for _, v in rest)]).tolist() == [0, 0, 1, 1]
    # The shorter side to 256, the central 224, ImageNet's statistics.
    image = Image.open(folder_root / "val" / "ant" / "0.JPEG")
    image = TF.pil_to_tensor(image.resize((int(256 * 80 / 60), 256), Image.Resampling.BILINEAR))
    left = round((image.shape[2] - 224) / 2)
    image = image[:, 16:240, left : left + 224] / 255
    expected = TF.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(x[0], expected)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", "jpg"), ("L", "jpg"), ("1", "png"), ("P", "png"), ("RGBA", "png"), ("I;16", "png")],
)
def test_images_of_other_modes_are_read_in_colour(tmp_path, mode, suffix):
    for part in ("train", "val"):
        (tmp_path / part / "ant").mkdir(parents=True)
        Image.new(mode, (40, 60)).save(tmp_path / part / "ant" / f"0.{suffix}")
    splits = load("imagefolder", tmp_path)
    ((x, _),) = batches(splits, batch_size=1)
    image, label = splits.test[0]
    assert x.shape == (1, 3, 224, 224) and image.shape == (3, 224, 224) and label == 0
    # CMYK without ink is white, the others' zeros are black.
    colour = 255 if mode == "CMYK" else 0
    assert (pixels_of(splits, image) == colour).all()


# --- subsets --------------------------------------------------------------------------------------


def test_subsets_are_nested_and_each_class_has_its_share():
    full = load("digits").train
    small, large = (load("digits", train_subset=n).train for n in (203, 500))
    assert (len(small), len(large)) == (203, 500)
    assert torch.equal(small.pixels, large.pixels[:203])
    share = full.labels.bincount() * 203 / 1437
    assert (small.labels.bincount() - share).abs().max() <= 1


def test_image_folder_subset(folder_root):
    splits = load("imagefolder", folder_root, train_subset=4)
    assert sorted(splits.train[i][1] for i in range(4)) == [0, 0, 1, 1]


@pytest.mark.parametrize("count", [0, -1, 1438])
def test_subset_out_of_range(count):
    with pytest.raises(DataError, match=f"between 1 and 1437.*got {count}"):
        load("digits", train_subset=count)


# --- order and augmentation -----------------------------------------------------------------------


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    splits = load("digits", augment=False)
    plain = splits.train.batch(range(1437))[0].flatten(1)
    reference = sorted(map(tuple, plain.tolist()))
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        got = batches(splits, batch_size=64, seed=seed, epoch=epoch)
        assert [len(y) for _, y in got] == [64] * 22 + [29]
        x = torch.cat([x for x, _ in got]).flatten(1)
        assert sorted(map(tuple, x.tolist())) == reference
        orders.append(x)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def sets(request, name):
    if name == "digits":
        return load(name)
    fixture = {"cifar10": "cifar_root", "imagefolder": "folder_root"}.get(name, "idx_root")
    return load(name, request.getfixturevalue(fixture))


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_seed_and_epoch_alone(request, name):
    splits = sets(request, name)
    size = {"digits": 300, "imagefolder": 3}.get(name, 16)
    expected = batches(splits, batch_size=size)
    torch.manual_seed(1)
    next(iter(sampling.train_loader(splits, size, seed=3, epoch=0)))
    assert_same(batches(splits, batch_size=size), expected)
    assert_same(batches(splits, batch_size=size, workers=2), expected)
    for start in range(len(expected) + 1):
        loader = sampling.train_loader(splits, size, seed=3, epoch=2, start_batch=start)
        assert len(loader) == len(expected) - start
        assert_same(list(loader), expected[start:])
    assert_same(batches(splits, batch_size=size, start_batch=1, workers=2), expected[1:])


@pytest.mark.parametrize("name", ["fashion-mnist", "imagefolder"])
def test_loading_leaves_the_default_generator_alone(request, name):
    splits = sets(request, name)
    before = torch.get_rng_state()
    batches(splits, batch_size=5)
    batches(splits, batch_size=5, workers=1)
    list(sampling.test_loader(splits, 5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["fashion-mnist", "imagefolder"])
def test_augmentation_of_an_image_does_not_depend_on_its_batch(request, name):
    splits = sets(request, name)
    small, large = (batches(splits, batch_size=size) for size in (3, 10))
    assert torch.equal(torch.cat([x for x, _ in small]), torch.cat([x for x, _ in large]))
    other = batches(splits, batch_size=10, epoch=3)
    plain = batches(
        load(
            name,
            request.getfixturevalue("idx_root" if name == "fashion-mnist" else "folder_root"),
            augment=False,
        ),
        batch_size=10,
    )
    assert not torch.equal(large[0][0], other[0][0])
    assert not torch.equal(large[0][0], plain[0][0])


@pytest.mark.parametrize(
    ("name", "padding", "flip"), [("mnist", 2, False), ("fashion-mnist", 2, True),
                                  ("cifar10", 4, True)]
)  # fmt: skip
def test_augmented_images_are_padded_crops_and_all_of_them_occur(request, name, padding, flip):
    splits = sets(request, name)
    size = splits.image_size
    originals = splits.train.pixels
    seen = set()
    # 40 images x 20 or 60 epochs over 25, 50 or 162 kinds: each kind is expected 32, 16 or 15
    # times; one that never comes by chance has probability below 162 * exp(-14.8) < 1e-4.
    for epoch in range(60 if name == "cifar10" else 20):
        draws = splits.train.draws(0, epoch)
        x, _ = splits.train.batch(range(TRAIN), draws)
        for image, original, draw in zip(pixels_of(splits, x), originals, draws, strict=True):
            top, left, mirrored = draw.tolist()
            expected = TF.crop(TF.pad(original, [padding]), top, left, size, size)
            assert torch.equal(image, TF.horizontal_flip(expected) if mirrored else expected)
            seen.add((top, left, mirrored))
    shifts = range(2 * padding + 1)
    assert seen == {(a, b, c) for a in shifts for b in shifts for c in range(1 + flip)}


def test_copies_of_one_file_are_augmented_differently(folder_root, tmp_path):
    source = folder_root / "train" / "ant" / "0.JPEG"
    for place in ("train/ant/0.jpg", "train/ant/1.jpg", "val/ant/0.jpg"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(source.read_bytes())
    ((x, _),) = batches(load("imagefolder", tmp_path), batch_size=2)
    assert not torch.equal(x[0], x[1])


def test_test_images_are_not_augmented(idx_root):
    splits = load("fashion-mnist", idx_root)
    x = torch.cat([x for x, _ in sampling.test_loader(splits, 7)])
    expected = idx_files()["t10k-images-idx3-ubyte"]
    assert np.array_equal(pixels_of(splits, x)[:, 0].numpy(), expected)
    assert torch.equal(splits.test[3][0], x[3]) and splits.test[3][1] == 3


def test_drop_last():
    splits = load("digits", train_subset=70)
    assert [len(y) for _, y in batches(splits, batch_size=32)] == [32, 32, 6]
    assert [len(y) for _, y in batches(splits, batch_size=32, drop_last=True)] == [32, 32]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"epoch": -1}, "epoch must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"start_batch": 6}, "between 0 and 5.*got 6"),
        ({"start_batch": -1}, "between 0 and 5.*got -1"),
        ({"batch_size": 71, "drop_last": True}, "71 with drop_last leaves no batch of the 70"),
    ],
)
def test_bad_loader_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        batches(load("digits", train_subset=70), **kwargs)


# --- what is wrong with a folder ------------------------------------------------------------------


def test_unknown_name_lists_the_names(tmp_path):
    with pytest.raises(DataError, match="unknown data set 'svhn'.*digits, mnist, fashion-mnist"):
        load("svhn", tmp_path)
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_missing_folder(tmp_path, name):
    with pytest.raises(DataError, match=f"does not exist: {tmp_path / 'none'}"):
        load(name, tmp_path / "none")
    with pytest.raises(DataError, match=f"{name} needs the folder"):
        load(name)
    with pytest.raises(DataError, match=str(tmp_path)):
        load(name, tmp_path)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:6],
        lambda data: b"",
        lambda data: b"\x1f\x8b" + data[2:],
        lambda data: bytes([0, 0, 13]) + data[3:],
        lambda data: b"<html>404 Not Found</html>",
    ],
    ids=["short", "long", "header cut", "empty", "magic", "type", "page"],
)
def test_damaged_idx_content_names_the_file(idx_root, name, damage, zipped):
    path = idx_root / name
    data = damage(path.read_bytes())
    if zipped:
        path.unlink()
        path = path.with_name(f"{name}.gz")
        data = gzip.compress(data)
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path}.*get the file anew"):
        load("mnist", idx_root)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no gzip" + data,
     lambda data: data[:30] + bytes(40) + data[70:]],
    ids=["short", "empty", "magic", "middle"],
)  # fmt: skip
def test_damaged_gzip_names_the_file(idx_root, damage):
    path = idx_root / f"{IMAGES}.gz"
    path.write_bytes(damage(gzip.compress((idx_root / IMAGES).read_bytes())))
    (idx_root / IMAGES).unlink()
    with pytest.raises(DataError, match=f"{path}.*get the file anew"):
        load("mnist", idx_root)


def test_one_idx_file_missing(idx_root):
    (idx_root / LABELS).unlink()
    with pytest.raises(DataError, match=f"missing file {idx_root / LABELS}"):
        load("mnist", idx_root)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (LABELS, np.arange(TEST - 1) % 10, f"20 images and .*{LABELS} 19 labels"),
        (LABELS, np.full(TEST, 10), f"{LABELS} holds the label 10"),
        (IMAGES, np.zeros((TRAIN, 28, 27)), f"{IMAGES} holds images of \\(28, 27\\)"),
        (IMAGES, np.zeros(TRAIN), f"{IMAGES} is damaged or not an IDX file of images"),
    ],
)
def test_idx_files_that_do_not_fit(idx_root, name, array, message):
    (idx_root / name).write_bytes(idx_bytes(array))
    with pytest.raises(DataError, match=message):
        load("mnist", idx_root)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_or_missing_cifar10_file(cifar_root, name):
    path = cifar_root / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path} is damaged.*unpack"):
        load("cifar10", cifar_root)
    path.unlink()
    with pytest.raises(DataError, match=f"missing file {path}: unpack"):
        load("cifar10", cifar_root)


@pytest.fixture
def small_folder(tmp_path):
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (40, 40), "red").save(tmp_path / part / label / "0.jpg")
    return tmp_path


def test_image_folder_without_validation_part(small_folder):
    (small_folder / "val").rename(small_folder / "test")
    with pytest.raises(DataError, match=f"missing folder {small_folder / 'val'}"):
        load("imagefolder", small_folder)


def test_image_folder_with_an_empty_class(small_folder):
    (small_folder / "train" / "bee" / "0.jpg").unlink()
    with pytest.raises(DataError, match=f"{small_folder / 'train'} must hold.*bee"):
        load("imagefolder", small_folder)


def test_image_folder_with_different_classes(small_folder):
    (small_folder / "val" / "bee").rename(small_folder / "val" / "cat")
    with pytest.raises(DataError, match="same classes.*bee, cat"):
        load("imagefolder", small_folder)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "short"])
def test_damaged_image_names_its_file(small_folder, content, workers):
    path = small_folder / "train" / "bee" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    splits = load("imagefolder", small_folder)
    with pytest.raises(DataError, match=f"cannot read the image {path}"):
        batches(splits, batch_size=2, workers=workers)
