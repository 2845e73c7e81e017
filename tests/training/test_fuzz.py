"""Thousands of damaged and hostile checkpoints: each is refused by name, or loads as it was."""

import codecs
import contextlib
import copy
import functools
import json
import random
import resource
import shutil
import signal
import struct
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn

import layerprune
from layerprune import GatedResidual, LayerPruner
from layerprune.ranks import Ranks
from layerprune.training import checkpoint, data, recipe, untrusted
from layerprune.training.assembly import build_network
from layerprune.training.builders import build_on_meta
from layerprune.training.checkpoint import CheckpointError, gated_model, load_model
from layerprune.training.engine import train
from layerprune.training.records import read_run
from layerprune.training.runfolder import RunFolderError, read_args, write_args
from layerprune.training.session import Session
from layerprune.training.structure import digest, random_inputs

WEIGHTS, STRUCTURE, TRAINING = "model.safetensors", "structure.json", "training.pt"
MIB = 1 << 20
ODD = (
    *(
        "../../x",
        "",
        ".",
        "..",
        "__class__",
        "forward",
        "conv1",
        "conv1.branch",
        "\ud800",
        "x" * 5000,
    ),
    *(None, True, -1, 0, 1 << 31, 1 << 62, 1 << 200, 1e308, 0.5, [], {}, [[]], {"a": {}}),
    *("torchvision.resnet18", "os.system", ["head"], [["x"]], {"name": "resnet110", "kwargs": {}}),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with eliminated, closed and open sections, its weights and its outputs."""
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint-1"
    torch.manual_seed(0)
    builder = {"name": "lenet5", "kwargs": {"num_classes": 3, "in_channels": 1, "image_size": 28}}
    model = build_on_meta(**builder)
    theta = {"conv1": 0.0, "conv2": 0.25, "fc1": 0.0, "fc2": 0.75}
    parts = [
        {
            "name": name,
            "kind": "residual",
            "several_arguments": False,
            "theta": value,
            "status": "open" if value else "eliminated",
        }
        for name, value in theta.items()
    ]
    gone = [name for name, value in theta.items() if not value]
    example = torch.zeros(2, 1, 28, 28)
    structure = checkpoint.structure_of(builder, "digits", example, gone, parts)
    lost = tuple(f"{name}.branch." for name in gone)
    weights = {
        name: torch.randn(tensor.shape).abs().to(tensor.dtype)
        for name, tensor in model.state_dict().items()
        if not name.startswith(lost)
    }
    training = {"optimizer": {"state": {0: {"m": torch.randn(7)}}}, "step": 1, "lr": [0.5, None]}
    checkpoint.save(folder, weights, structure, training)
    return folder, load_model(folder)[0].state_dict(), training


@pytest.fixture
def target(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "checkpoint-1")


@contextlib.contextmanager
def guarded(seconds=60, headroom=256 * MIB):
    """Fails on a hang, and makes an allocation beyond the headroom a MemoryError."""

    def late(*arguments):
        raise TimeoutError("it hangs")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_guard_itself():
    with guarded(), pytest.raises((MemoryError, RuntimeError)):
        torch.empty(512 * MIB, dtype=torch.uint8)


def sign(folder, structure=None):
    """Makes the checksums right, as an attacker would."""
    structure = structure or json.loads((folder / STRUCTURE).read_text())
    structure["checksums"] = {name: untrusted.sha256(folder / name) for name in (WEIGHTS, TRAINING)}
    structure["checksums"]["structure"] = digest(structure)
    (folder / STRUCTURE).write_text(json.dumps(structure))


def damaged(data, generator):
    """The bytes with one thing wrong; never the same bytes."""
    at, data = generator.randrange(len(data)), bytearray(data)
    kind = generator.randrange(5)
    if kind == 0:
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        data[at] = (data[at] + generator.randrange(1, 256)) % 256
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + generator.randrange(1, 9)]
    else:
        data[at:at] = generator.randbytes(generator.randrange(1, 9))
    return bytes(data)


def outcome(read, path):
    """What reading gives; None if it was refused with the file's name."""
    try:
        with guarded():
            return read()
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return None


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [STRUCTURE, WEIGHTS])
def test_damaged_bytes(original, target, name):
    """Nothing that changes a weight or a decision goes unnoticed."""
    data, generator = (target / name).read_bytes(), random.Random(name)
    refused = 0
    for _ in range(500):
        (target / name).write_bytes(damaged(data, generator))
        found = outcome(lambda: load_model(target), target / name)
        refused += found is None
        if found is not None:  # white space of the JSON, say
            assert_same(found[0].state_dict(), original[1])
    assert refused > 350 if name == STRUCTURE else refused == 500


def test_hostile_headers(target):
    """Headers that somebody wrote on purpose, with the checksum that goes with them."""
    data, generator = (target / WEIGHTS).read_bytes(), random.Random(0)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    shapes = {key: value.shape for key, value in load_model(target)[0].state_dict().items()}

    def written(content, tail=data[8 + length :], claimed=None):
        claimed = len(content) if claimed is None else claimed
        (target / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + content + tail)
        sign(target)
        found = outcome(lambda: load_model(target), target / WEIGHTS)
        if found is not None:
            assert {k: v.shape for k, v in found[0].state_dict().items()} == shapes
        return found

    assert written(json.dumps(header).encode()) is not None
    for _ in range(500):
        written(damaged(data[8 : 8 + length], generator))
    for claimed in (0, 1, length - 1, length + 1, 1 << 24, 1 << 30, 1 << 40, 1 << 63, 2**64 - 1):
        assert written(data[8 : 8 + length], claimed=claimed) is None
    for content in (b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"", b"null", b"[]", b'{"a":3}'):
        assert written(content) is None
    for _ in range(300):
        changed = copy.deepcopy(header)
        name = generator.choice([key for key in changed if key != "__metadata__"])
        kind, odd = generator.randrange(6), generator.choice(ODD)
        if kind == 0:
            changed[str(odd).encode(errors="replace").decode()] = changed.pop(name)
        elif kind == 1:
            changed[name]["shape"] = [generator.choice([1 << 20, 1 << 40, 1 << 62, 0, -1])] * 2
        elif kind == 2:
            changed[name]["data_offsets"][generator.randrange(2)] = odd
        elif kind == 3:
            changed[name]["dtype"] = generator.choice(["F64", "F8_E5M2", "I64", "C64", "X", odd])
        elif kind == 4:
            changed[name] = odd
        else:
            del changed[name]
        assert written(json.dumps(changed).encode()) is None or changed == header


def replaced(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def paths(value, prefix=()):
    yield prefix
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(child, (*prefix, key))


def test_hostile_structures(original, target):
    """Values of every kind in every place of the structure, signed: every one a clear answer."""
    structure = json.loads((target / STRUCTURE).read_text())
    del structure["checksums"]
    generator = random.Random(1)
    places = [path for path in paths(structure) if path]
    shapes = {key: value.shape for key, value in original[1].items()}
    changes = [(path, odd) for path in places for odd in ODD]
    refused = 0
    for path, odd in generator.sample(changes, 700):
        sign(target, replaced(structure, path, odd))
        found = outcome(lambda: load_model(target), target)
        refused += found is None
        if found is None:
            continue
        outcome(lambda: gated_model(target), target)
        for name, tensor in found[0].state_dict().items():
            assert tensor.shape == shapes.get(name, tensor.shape)
        inputs = found[1]["inputs"]
        if inputs is not None:
            with guarded(headroom=600 * MIB):
                random_inputs(inputs, torch.Generator())
    assert refused > 400


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.mixer, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x, scale=1.0):
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


def two_branches():
    return nn.Sequential(TwoBranches(), TwoBranches(), nn.Linear(4, 2))


def test_hostile_structures_of_branches(tmp_path):
    """Likewise of sections inside of blocks, whose modules are named one by one."""
    torch.manual_seed(0)
    model, x = two_branches(), torch.randn(3, 4)
    pruner = LayerPruner(model, example_inputs=x, total_steps=100, strength=1)
    expected = set(model.state_dict())
    pruner._eliminate([0, 1, 3], ())
    target = tmp_path / "checkpoint-1"
    layerprune.save(target, pruner, example_inputs=x, training={})
    plain = load_model(target, two_branches)[0]
    assert plain(x).equal(pruner.strip().eval()(x))
    structure = json.loads((target / STRUCTURE).read_text())
    del structure["checksums"]
    places = [path for path in paths(structure["sections"]) if path]
    generator, refused = random.Random(1), 0
    for path, odd in generator.sample([(path, odd) for path in places for odd in ODD], 400):
        sign(target, replaced(structure, ("sections", *path), odd))
        found = outcome(lambda: load_model(target, two_branches), target)
        refused += found is None
        if found is not None:
            outcome(lambda: gated_model(target, two_branches), target)
            assert set(found[0].state_dict()) <= expected
    assert refused > 150


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 1_000_000,
        '{"a":' * 300_000,
        "[]," * 600_000,
        " " * (1 << 22),
        "9" * 1_000_000,
        '{"schema": ' + "9" * 5000 + "}",
        '{"schema": NaN}',
        '{"schema": 2}',
        '{"schema": 3}',
        '{"schema": 1}',
        '{"schema": true}',
        '{"schema": [2]}',
        '{"schema": 2, "checksums": {"structure": 3}}',
        "\ufeff{}",
    ],
)
def test_texts_that_are_no_structure(target, text):
    (target / STRUCTURE).write_text(text)
    assert outcome(lambda: load_model(target), target / STRUCTURE) is None


@pytest.mark.parametrize(
    "kwargs",
    [
        {"width": 65536, "shortcut": "B"},
        {"width": 65536, "num_classes": 65536, "in_channels": 65536, "image_size": 65536},
        {"width": 65537},
        {"width": 1 << 62},
        {"width": 0},
        {"width": 2.5},
        {"width": True},
        {"width": None},
        {"depth": 50000},
        {"__class__": 1},
        {"self": 1},
        {"name": "vgg16"},
    ],
)
@pytest.mark.parametrize("everything_gone", [False, True])
def test_a_giant_takes_no_memory(target, kwargs, everything_gone):
    structure = json.loads((target / STRUCTURE).read_text())
    sizes = {"num_classes": 3, "in_channels": 1, "image_size": 8}
    structure["builder"] = {"name": "resnet20", "kwargs": sizes | kwargs}
    structure |= {"eliminated": [], "sections": []}
    if everything_gone:
        structure["eliminated"] = [f"block{i}_{j}" for i in (1, 2, 3) for j in (1, 2, 3)]
    sign(target, structure)
    for read in (load_model, gated_model):
        assert outcome(lambda: read(target), target) is None  # noqa: B023


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("torchvision.resnet18", {"weights": "DEFAULT"}),
        ("torchvision.resnet18", {"pretrained": True}),
        ("torchvision.resnet18", {"progress": False}),
        ("torchvision.resnet18", {"norm_layer": "x"}),
        ("torchvision.get_model", {}),
        ("torchvision.models.resnet18", {}),
        ("torchvision.", {}),
        ("torchvision.vit_b_16", {"image_size": 65535}),
    ],
)
def test_torchvision_builders_fetch_nothing(target, name, kwargs):
    structure = json.loads((target / STRUCTURE).read_text())
    sign(target, structure | {"builder": {"name": name, "kwargs": kwargs}})
    assert outcome(lambda: load_model(target), target) is None


def repacked(path, change):
    """Writes a file of torch.save anew, its entries changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), change(name, content))


def test_damaged_training_states(original, target):
    data, generator = (target / TRAINING).read_bytes(), random.Random(2)
    for count in range(400):
        if count % 2:
            (target / TRAINING).write_bytes(damaged(data, generator))
        else:
            (target / TRAINING).write_bytes(data)
            repacked(
                target / TRAINING,
                lambda name, content: damaged(content, generator) if ".pkl" in name else content,
            )
        if count < 50:
            assert outcome(lambda: checkpoint.read_training(target), target / TRAINING) is None
        sign(target)
        outcome(lambda: checkpoint.read_training(target), target / TRAINING)
    (target / TRAINING).write_bytes(data)
    sign(target)
    found = checkpoint.read_training(target)
    assert torch.equal(
        found["optimizer"]["state"][0].pop("m"), original[2]["optimizer"]["state"][0]["m"]
    )
    assert found == {"optimizer": {"state": {0: {}}}, "step": 1, "lr": [0.5, None]}


def forged(folder, training):
    """Writes a training state into a checkpoint, with the checksum that goes with it."""
    torch.save(training, folder / TRAINING)
    structure = json.loads((folder / STRUCTURE).read_text())
    structure["checksums"][TRAINING] = untrusted.sha256(folder / TRAINING)
    structure["checksums"]["structure"] = digest(structure)
    (folder / STRUCTURE).write_text(json.dumps(structure))


def hostile_states(training, seed, count):
    """Training states with an odd value in one place, and such as have broken things before."""
    generator = random.Random(seed)
    plain = (None, True, -1, 1 << 62, 1e308, float("nan"), "x", [], [1], {}, {"a": {}})
    tensors = (torch.full((1,), torch.nan), torch.zeros(3, 1), torch.zeros(1).expand(1, 3 << 30))
    nested = functools.reduce(lambda inner, _: [inner, inner], range(24), [])
    odd = (*plain, *tensors, nested)
    places = [path for path in paths(training) if path]
    for path in generator.sample(places, min(count, len(places))):
        yield replaced(training, path, generator.choice(odd))
    for value in odd:
        yield training | {"recipe": value}
        yield training | {"pruner": value}
    status = training["pruner"]["status"]
    for value in (status * 2, status[:-1], ["foo"] * len(status)):
        yield replaced(training, ("pruner", "status"), value)


def answered(restore, folder):
    """Whether a state was refused by its file's name; else it was taken."""
    try:
        with guarded():
            restore()
    except (CheckpointError, RunFolderError) as error:
        assert str(folder) in str(error) and len(str(error)) < 2000 and "\n" not in str(error)
        return True
    return False


def test_hostile_states_of_an_own_loop(tmp_path):
    """What is refused leaves pruner and model as they were."""

    def pruner():
        torch.manual_seed(0)
        blocks = [GatedResidual(nn.Linear(4, 4)) for _ in range(3)]
        return LayerPruner(
            nn.Sequential(*blocks), example_inputs=torch.ones(2, 4), total_steps=20, strength=0.1
        )

    saved, x = pruner(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(saved.model.parameters(), lr=0.1)
    for _ in range(5):
        saved.model(x).square().mean().backward()
        optimizer.step()
        saved.step(optimizer)
    folder = tmp_path / "c"
    layerprune.save(folder, saved, training={"optimizer": optimizer.state_dict()})
    training = torch.load(folder / TRAINING, weights_only=True)
    refused = 0
    for state in hostile_states(training, 3, 100):
        forged(folder, state)
        fresh = pruner()
        if answered(lambda: layerprune.restore(folder, fresh), folder):  # noqa: B023
            refused += 1
            assert fresh.step_count == 0
            assert_same(fresh.model.state_dict(), pruner().model.state_dict())
    assert refused > 60


def test_hostile_states_of_a_run(small, tmp_path):
    one = replace(small, epochs=5, train_subset=256, model="mlp12", model_args={"width": 4})
    train(one, None, tmp_path / "run", progress=False, device="cpu")
    folder = tmp_path / "run" / "checkpoint-20"
    training = torch.load(folder / TRAINING, weights_only=True)
    splits, cpu = data.load("digits", train_subset=256), torch.device("cpu")
    refused = 0
    for state in hostile_states(training, 4, 30):
        forged(folder, state)
        session = Session(one, build_network(one, splits, cpu), tmp_path / "run", cpu, Ranks())
        refused += answered(lambda: session.restore(folder), folder)  # noqa: B023
    assert refused > 40


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Calls(print, "code ran"),
        Calls(eval, "print('code ran')"),
        Calls(bytearray, 1 << 40),
        Calls(torch.Tensor, 1 << 40),
        Calls(torch.UntypedStorage, 1 << 40),
        functools.reduce(lambda x, _: Calls(codecs.encode, x, "hex"), range(24), b"x" * 64),
        nn.Linear(2, 2),
    ],
)
def test_pickles_that_call(target, capsys, call):
    torch.save({"optimizer": call}, target / TRAINING)
    sign(target)
    assert outcome(lambda: checkpoint.read_training(target), target / TRAINING) is None
    assert "code ran" not in capsys.readouterr().out


def test_a_training_state_that_unpacks_to_more(target):
    """Of a kilobyte a gigabyte, by compression; torch reads such a file."""
    with zipfile.ZipFile(target / TRAINING) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(target / TRAINING, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + (b"\0" * (64 * MIB) if "data/0" in name else b""))
    sign(target)
    assert outcome(lambda: checkpoint.read_training(target), target / TRAINING) is None


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: *a\n",
        "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
        "[" * 50_000,
        "!!python/object/apply:os.system [ls]",
        "x" * 70_000,
        "a: 2001-99-99",
        "!!int ''",
        "\0",
    ],
)
def test_yaml_that_is_refused(tmp_path, text):
    for name in ("args.yaml", "summary.csv"):
        (tmp_path / name).write_text(text)
    for read, error in (
        (lambda: recipe.load(str(tmp_path / "args.yaml")), recipe.RecipeError),
        (lambda: read_args(tmp_path), RunFolderError),
        (lambda: read_run(tmp_path), ValueError),
    ):
        with guarded(), pytest.raises(error, match=r"args\.yaml") as raised:
            read()
        assert len(str(raised.value)) < 2000


def test_what_is_written_twice_is_read_back(tmp_path, small):
    """YAML would write the second of two equal lists as a reference to the first."""
    shared = {"theta_init": 0.5}
    twice = replace(small, prune_config=shared, model_args={"width": 4})
    object.__setattr__(twice, "model_args", shared)
    write_args(tmp_path, twice, None)
    assert "&" not in (tmp_path / "args.yaml").read_text()
    assert read_args(tmp_path)[0].model_args == shared
