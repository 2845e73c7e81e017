"""Checkpoints of a training loop that is not this package's."""

import copy
import json
import os
import random

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models import resnet18

import layerprune
from layerprune import GatedResidual, LayerPruner, PruneConfig, verify
from layerprune.ranks import FirstRankFailed
from layerprune.training import checkpoint
from layerprune.training.checkpoint import CheckpointError, gated_model, load_model
from layerprune.training.evaluation import compaction_difference
from layerprune.training.structure import digest


class Mixing(nn.Module):
    """A block that is called with its input and a mask, in a model with one of each other kind."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x, mask):
        return x * mask + self.first(x)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.masked = nn.ModuleList(Mixing() for _ in range(3))
        self.stack = nn.Sequential(
            *(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)),
            GatedResidual(nn.Linear(4, 4), nn.Linear(4, 4), "relu"),
            GatedResidual(nn.Linear(4, 4)),
        )
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        self.register_buffer("fixed", torch.ones(2), persistent=False)

    def forward(self, x, mask):
        for block in self.masked:
            x = block(x, mask)
        return self.head(self.stack(x)) * self.fixed


def inputs(rows=6):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, 4, generator=generator),
        torch.randn(rows, 4, generator=generator).abs(),
    )


COSTS = {
    **{f"masked.{i}": 10.0 ** -(i * 3 % 8 / 2) for i in range(3)},
    **{f"stack.{i}": 10.0 ** -((i + 3) * 3 % 8 / 2) for i in range(5)},
}


class Loop:
    """Some steps of a run, in which sections leave one after the other."""

    def __init__(self, total=16):
        torch.manual_seed(0)
        attraction = {"rule": "attraction", "tolerance": 0.3}
        self.pruner = LayerPruner(
            Mixed(),
            example_inputs=inputs(),
            total_steps=total,
            strength=0.5,
            cost=COSTS,
            config=PruneConfig(warm_up=0, warm_up_limit=0.1, learning_end=0.9, **attraction),
            seed=1,
        )
        self.make_optimizer()

    def make_optimizer(self):
        self.optimizer = torch.optim.SGD(self.pruner.model.parameters(), lr=0.1, weight_decay=0.1)

    def go(self, steps):
        model = self.pruner.model.train()
        for _ in range(steps):
            model(*inputs()).square().mean().backward()
            self.optimizer.step()
            self.pruner.step(self.optimizer)
            self.optimizer.zero_grad()
        return self


@pytest.fixture(params=[0, 5, 16])
def loop(request):
    return Loop().go(request.param)


def test_load_gives_the_network_that_evaluation_runs(loop, tmp_path):
    """Sections of all kinds, in every state of a run, and the pruner left as it was."""
    path = tmp_path / "checkpoint"
    layerprune.save(path, loop.pruner, example_inputs=inputs())
    with pytest.raises(CheckpointError, match="names no builder: give one"):
        layerprune.load(path)
    seed = torch.get_rng_state()
    plain = layerprune.load(path, Mixed)
    assert torch.equal(torch.get_rng_state(), seed)
    assert not plain.training and plain.tied is plain.head
    gated = loop.pruner.model
    assert verify(gated, plain, [inputs()]) == 0.0
    assert compaction_difference(path, [inputs()], torch.device("cpu"), Mixed) == 0.0
    assert verify(gated_model(path, Mixed), plain, [inputs()]) == 0.0
    # What strip() leaves is the same network, layer by layer, and is saved just so.
    stripped = loop.pruner.strip()
    assert repr(stripped.eval()) == repr(plain)
    layerprune.save(path, loop.pruner)
    again, structure = load_model(path, Mixed)
    assert repr(again) == repr(plain) and structure["inputs"] is None
    for (name, one), two in zip(
        plain.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name


def test_some_sections_are_gone_before_the_end():
    """What the tests above and below rest on."""
    statuses = {info.status for info in Loop().go(5).pruner.sections}
    assert statuses == {"open", "eliminated"}


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, at):
    whole = Loop().go(16)
    first = Loop().go(at)
    training = {"optimizer": first.optimizer.state_dict(), "epoch": 3}
    layerprune.save(tmp_path / "c", first.pruner, training=training)
    second = Loop()
    found = layerprune.restore(tmp_path / "c", second.pruner)
    second.make_optimizer()
    second.optimizer.load_state_dict(found["optimizer"])
    assert found["epoch"] == 3
    second.go(16 - at)
    assert second.pruner.events == whole.pruner.events
    ours, theirs = second.pruner.model.state_dict(), whole.pruner.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_restoring_what_does_not_fit(tmp_path):
    loop = Loop().go(2)
    layerprune.save(tmp_path / "c", loop.pruner)
    with pytest.raises(CheckpointError, match=r"missing file .*training\.pt"):
        layerprune.restore(tmp_path / "c", Loop().pruner)
    layerprune.save(tmp_path / "c", loop.pruner, training={})
    with pytest.raises(CheckpointError, match=r"training\.pt is of another run: .*16 steps"):
        layerprune.restore(tmp_path / "c", Loop(total=17).pruner)
    with open(tmp_path / "c" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    fresh = Loop().pruner
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        layerprune.restore(tmp_path / "c", fresh)
    assert fresh.step_count == 0


def test_a_link_to_a_checkpoint_stays_one(tmp_path, monkeypatch):
    loop = Loop().go(2)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        layerprune.save(tmp_path / "link", loop.pruner, training={})
    assert (tmp_path / "link").is_symlink() and layerprune.load(tmp_path / "real", builder=Mixed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    layerprune.save(".", loop.pruner, training={})
    assert layerprune.load(tmp_path / "here", builder=Mixed)


def test_the_last_seed_is_taken_back(tmp_path):
    example, seed = torch.ones(2, 4), 2**63 - 1

    def make():
        model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), nn.Linear(4, 2))
        return LayerPruner(model, example_inputs=example, total_steps=20, strength=0.1, seed=seed)

    layerprune.save(tmp_path / "c", make(), training={})
    fresh = make()
    layerprune.restore(tmp_path / "c", fresh)
    assert fresh.state_dict()["bank"]["seed"] == seed


def test_every_dtype_that_is_saved_is_loaded(tmp_path):
    kinds = "float64 float16 bfloat16 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64"
    kinds = [getattr(torch, name) for name in (*kinds.split(), "float8_e4m3fn", "float8_e5m2")]

    def build():
        model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), nn.Linear(4, 2))
        for number, kind in enumerate(kinds):
            model.register_buffer(f"kept{number}", torch.ones(3).to(kind))
        return model

    example = torch.ones(2, 4)
    pruner = LayerPruner(build(), example_inputs=example, total_steps=20, strength=0.1)
    layerprune.save(tmp_path / "c", pruner)
    found = layerprune.load(tmp_path / "c", builder=build)
    assert [buffer.dtype for buffer in found.buffers()] == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_builders_need_no_script(tmp_path, dtype):
    example = torch.zeros(2, 3, 32, 32, dtype=dtype)
    torch.manual_seed(0)
    model = resnet18(num_classes=5).to(dtype)
    pruner = LayerPruner(model, example_inputs=example, total_steps=40, strength=0.1)
    for index in (1, 3, 6):
        pruner._run.bank.theta[index] = 0.1
    pruner._run.bank.advance()
    name = ("torchvision.resnet18", {"num_classes": 5})
    layerprune.save(tmp_path / "c", pruner, builder=name, example_inputs=example)
    plain = layerprune.load(tmp_path / "c")
    images = torch.randn(2, 3, 32, 32).to(dtype)
    assert verify(model, plain, [images]) == 0.0
    assert verify(gated_model(tmp_path / "c"), plain, [images]) == 0.0
    assert next(plain.parameters()).dtype == dtype
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert sum(type(m) is nn.Identity for m in plain.modules()) == 2  # the third has a downsample
    with pytest.raises(ValueError, match=r"resnet18.* does not build this model: .*fc\.weight"):
        layerprune.save(tmp_path / "c", pruner, builder=(name[0], {}))


def test_what_is_given_to_save(tmp_path):
    pruner = Loop().pruner
    with pytest.raises(TypeError, match="plain values.* got list: leave them out"):
        layerprune.save(tmp_path / "c", pruner, example_inputs=(inputs()[0], [1]))
    with pytest.raises(ValueError, match="training cannot be saved: .*Mixed"):
        layerprune.save(tmp_path / "c", pruner, training={"model": Mixed()})
    with pytest.raises(ValueError, match="training cannot be saved: .*lambda"):
        layerprune.save(tmp_path / "c", pruner, training={"schedule": lambda step: step})
    with pytest.raises(ValueError, match="unknown model 'x'"):
        layerprune.save(tmp_path / "c", pruner, builder=("x", {}))
    assert not (tmp_path / "c").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("x")
    for path in (tmp_path / "letters", tmp_path / "letters" / "one.txt"):
        with pytest.raises(FileExistsError, match="choose another path"):
            layerprune.save(path, pruner)
    layerprune.save(tmp_path / "c", pruner, example_inputs={"x": inputs()[0], "mask": None, "n": 2})
    assert json.loads((tmp_path / "c" / "structure.json").read_text())["inputs"] == {
        "x": {"shape": [6, 4], "dtype": "float32"},
        "mask": {"value": None},
        "n": {"value": 2},
    }


def test_what_is_renumbered_is_not_saved(tmp_path):
    pruner = Loop().go(5).pruner
    pruner.strip(renumber=True)
    with pytest.raises(ValueError, match="save it before strip"):
        layerprune.save(tmp_path / "c", pruner)
    assert not (tmp_path / "c").exists()


def test_a_builder_of_another_model_or_precision(tmp_path):
    layerprune.save(tmp_path / "c", Loop().pruner)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        layerprune.load(tmp_path / "c", lambda: nn.Sequential(*copy.deepcopy(Mixed()).masked))
    with pytest.raises(CheckpointError, match=r"is F32 .* the network has torch\.bfloat16"):
        layerprune.load(tmp_path / "c", lambda: Mixed().to(torch.bfloat16))


def test_first_schema_is_read(tmp_path):
    """A checkpoint as version 0.1 wrote it: no checksums, no inputs, no argument counts."""
    model = layerprune.models.build("resnet20", num_classes=2, in_channels=1, image_size=8, width=2)
    kwargs = {"num_classes": 2, "in_channels": 1, "image_size": 8, "width": 2}
    builder = {"name": "resnet20", "kwargs": kwargs}
    structure = checkpoint.structure_of(builder, "digits", None, [], [])
    checkpoint.save(tmp_path / "c", model.state_dict(), structure)
    part = {"name": "block1_2", "kind": "residual", "theta": 0.2, "status": "open"}
    old = structure | {"schema": 1, "sections": [part]}
    del old["inputs"]
    (tmp_path / "c" / "structure.json").write_text(json.dumps(old))
    plain, found = load_model(tmp_path / "c")
    assert isinstance(plain.block1_2, nn.Identity)
    assert found["inputs"] == [{"shape": [2, 1, 8, 8], "dtype": "float32"}]
    images = torch.randn(2, 1, 8, 8)
    assert verify(gated_model(tmp_path / "c"), plain, [images]) == 0.0


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.again = nn.LayerNorm(4), nn.LayerNorm(4)
        self.mixer, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.again(x))


def test_second_schema_is_read(tmp_path):
    """There, a block told how many branches it has, and not which."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(TwoBranches(), TwoBranches(), nn.Linear(4, 2))

    model, x = build(), torch.randn(3, 4)
    pruner = layerprune.LayerPruner(model, example_inputs=x, total_steps=100, strength=1)
    pruner._eliminate([0, 1, 3], ())
    layerprune.save(tmp_path / "c", pruner, example_inputs=x, training={})
    path = tmp_path / "c" / "structure.json"
    old = json.loads(path.read_text()) | {"schema": 2}
    for part in old["sections"]:
        part["several_arguments"], part["full"] = False, part.pop("shaped")
        part["block"]["branches"] = len(part["block"].pop("ends"))
    old["checksums"]["structure"] = digest(old)
    path.write_text(json.dumps(old))
    plain = load_model(tmp_path / "c", build)[0]
    assert type(plain[0]) is nn.Identity and plain(x).equal(pruner.strip().eval()(x))


SCHEDULES = {
    "MultiStepLR": {"milestones": [2, 2, 5]},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "ReduceLROnPlateau": {},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "LambdaLR": {"lr_lambda": lambda step: 0.5},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_states_that_training_holds(tmp_path, name, kind):
    """What optimizers, schedules, scalers, averages and generators keep comes back as it was."""
    loop = Loop()
    model, optimizer = loop.pruner.model, kind(loop.pruner.model.parameters())
    schedule = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULES[name])
    model(*inputs()).sum().backward()
    optimizer.step()
    training = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "average": torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)).state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }
    layerprune.save(tmp_path / "c", loop.pruner, training=training)
    found = layerprune.restore(tmp_path / "c", Loop().pruner)
    ours, theirs = tree_flatten(found), tree_flatten(training)
    assert ours[1] == theirs[1]
    for one, two in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def _cannot_write(rank, folder):
    try:
        layerprune.save(f"{folder}/a-file", Loop().go(1).pruner, training={})
    except (FileExistsError, FirstRankFailed) as error:
        return type(error).__name__
    return "saved"


def test_no_rank_takes_for_saved_what_the_first_could_not_write(tmp_path):
    (tmp_path / "a-file").touch()
    assert run_ranks(_cannot_write, 2, str(tmp_path)) == ["FileExistsError", "FirstRankFailed"]


def _saves_and_restores(rank, folder):
    loop = Loop().go(2)
    layerprune.save(f"{folder}/c", loop.pruner, training={"rank": 7})
    written = sorted(os.listdir(f"{folder}/c"))  # on all ranks: they have waited
    fresh = Loop()
    found = layerprune.restore(f"{folder}/c", fresh.pruner)
    return written, found, fresh.pruner.digest() == loop.pruner.digest()


def test_two_ranks_share_a_checkpoint(tmp_path):
    answers = run_ranks(_saves_and_restores, 2, str(tmp_path))
    files = ["model.safetensors", "structure.json", "training.pt"]
    assert list(answers) == [(files, {"rank": 7}, True)] * 2
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize(
    "given",
    [
        {"builder": "torchvision.resnet18"},
        {"builder": ("lenet5", 3)},
        {"builder": len},
        {"training": [1]},
    ],
    ids=repr,
)
def test_what_save_cannot_take_is_refused_and_leaves_nothing(tmp_path, given):
    with pytest.raises(TypeError, match=next(iter(given))):
        layerprune.save(tmp_path / "c", Loop().pruner, **given)
    assert not os.listdir(tmp_path)


def test_a_refused_value_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="training cannot be saved"):
        layerprune.save(tmp_path / "c", Loop().go(1).pruner, training={"loss": object()})
    assert not os.listdir(tmp_path)


def test_a_builder_that_is_none(tmp_path):
    loop = Loop()
    layerprune.save(tmp_path / "c", loop.pruner)
    for builder, message in ((loop.pruner.model, "must be a function"), (list, "returned list")):
        with pytest.raises(layerprune.training.checkpoint.CheckpointError, match=message):
            layerprune.load(tmp_path / "c", builder=builder)
