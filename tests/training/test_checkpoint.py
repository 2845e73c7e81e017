import json
import os
import pickle
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from layerprune.training import checkpoint, checkpoint_files, untrusted
from layerprune.training.checkpoint import load_model
from layerprune.training.engine import train
from layerprune.training.runfolder import CheckpointError, drop_old, locate, mark, marked, recover
from layerprune.training.structure import digest

WEIGHTS, STRUCTURE, TRAINING = "model.safetensors", "structure.json", "training.pt"


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A finished pruned run; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = replace(small, epochs=3, strength=0.3)
    train(recipe, None, folder, progress=False, device="cpu")
    return recipe, folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[1], tmp_path / "run")


def edit(path, **changes):
    """Changes a structure, or another file's checksum in it, as one would who knows the format."""
    changed = json.loads(path.read_text()) | changes
    for file in path.parent.iterdir():
        if file != path:
            changed["checksums"][file.name] = untrusted.sha256(file)
    changed["checksums"]["structure"] = digest(changed)
    path.write_text(json.dumps(changed))


def test_markers_folders_and_runs_all_load(run):
    last = run / "checkpoint-30"
    for path in (run, run / "model", last, run / "last", str(last)):
        model, structure = load_model(path)
        assert structure["builder"]["name"] == "resnet20"
        assert not model.training
    shutil.rmtree(run / "model")
    assert load_model(run)[1] == load_model(last)[1]


@pytest.mark.parametrize("name", [WEIGHTS, STRUCTURE, TRAINING])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "garbage"])
def test_damage_is_named(finished, run, name, damage):
    path = run / "checkpoint-30" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-20], "empty": b"", "garbage": b"\x80\x05x"}[damage])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        train(finished[0], None, run, resume=True, progress=False, device="cpu")
    if name != TRAINING:
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_model(run / "checkpoint-30")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 99}, "schema version 99"),
        ({"schema": None}, "schema version None"),
        ({"builder": {"name": "os.system", "kwargs": {}}}, "unknown model"),
        ({"builder": {"name": "resnet20", "kwargs": {"depth": 5}}}, "no argument depth"),
        ({"builder": 3}, "damaged"),
        ({"eliminated": ["head"]}, "'head' is no section"),
        ({"eliminated": [["x"]]}, "damaged"),
        ({"eliminated": ["block1_2", "block1_2"]}, "damaged"),
        ({"sections": [{"name": "x"}]}, "damaged"),
    ],
)
def test_structures_that_are_refused(run, changes, words):
    edit(run / "model" / STRUCTURE, **changes)
    with pytest.raises(CheckpointError, match=words):
        load_model(run)


def test_weights_of_another_structure(run):
    edit(run / "model" / STRUCTURE, eliminated=[], sections=[])
    with pytest.raises(CheckpointError, match="does not fit.*missing"):
        load_model(run)


def test_a_checkpoint_of_another_model_is_not_resumed(finished, run):
    path = run / "checkpoint-30" / STRUCTURE
    builder = json.loads(path.read_text())["builder"]
    edit(path, builder={"name": "resnet32", "kwargs": builder["kwargs"]})
    with pytest.raises(CheckpointError, match="another model.*resnet32"):
        train(finished[0], None, run, resume=True, progress=False, device="cpu")


def test_state_of_another_run_is_not_resumed(finished, run):
    path = run / "checkpoint-30" / TRAINING
    training = torch.load(path, weights_only=True)
    training["pruner"]["total_steps"] = 31
    torch.save(training, path)
    edit(path.with_name(STRUCTURE))
    with pytest.raises(CheckpointError, match="31 steps"):
        train(finished[0], None, run, resume=True, progress=False, device="cpu")


class Exploit:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_no_code_runs_on_loading(finished, run, capsys, dump):
    with open(run / "checkpoint-30" / TRAINING, "wb") as file:
        dump({"place": Exploit()}, file)
    edit(run / "checkpoint-30" / STRUCTURE)
    with pytest.raises(CheckpointError, match=r"training\.pt"):
        train(finished[0], None, run, resume=True, progress=False, device="cpu")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["../../etc", "checkpoint-30/..", "", "checkpoint-31"])
def test_markers_that_point_elsewhere(run, content):
    (run / "last").write_text(content)
    with pytest.raises(CheckpointError, match="last"):
        marked(run, "last")


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    structure = checkpoint.structure_of({"name": "x", "kwargs": {}}, "digits", None, [], [])
    checkpoint.save(folder, {"w": torch.zeros(2)}, structure, {"a": 1})

    def crash(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", crash)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(folder, {"w": torch.ones(2)}, structure, {"a": 2})
    assert checkpoint.read_weights(folder)["w"].tolist() == [0, 0]
    assert checkpoint.read_training(folder) == {"a": 1}
    # The next one takes its place, and cleans up.
    checkpoint.save(folder, {"w": torch.ones(2)}, structure, {"a": 2})
    assert checkpoint.read_weights(folder)["w"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_foreign_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        load_model(tmp_path)


def test_a_dense_run_loads_too(finished, tmp_path):
    dense = replace(finished[0], prune=False, epochs=1)
    train(dense, None, tmp_path / "dense", progress=False, device="cpu")
    model, structure = load_model(tmp_path / "dense")
    assert structure["eliminated"] == [] and "block1_1.branch.conv1.weight" in model.state_dict()


class Killed(BaseException):
    """No handler of the program's sees it, as no handler sees SIGKILL."""


def killed_at(monkeypatch, call, count):
    """Raises at the given call of a function, before or after it did its work."""
    original, calls = getattr(os, call), []

    def replacement(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise Killed
        original(*arguments)

    monkeypatch.setattr(os, call, replacement)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_kill_at_any_moment_leaves_one_whole_checkpoint(tmp_path, monkeypatch, call, count):
    run = tmp_path / "run"
    folder = run / "checkpoint-1"
    structure = checkpoint.structure_of({"name": "x", "kwargs": {}}, "digits", None, [], [])
    checkpoint.save(folder, {"w": torch.zeros(2)}, structure, {"a": 0})
    mark(run, "last", "checkpoint-1")
    with monkeypatch.context() as broken, suppress(Killed):
        killed_at(broken, call, count)
        checkpoint.save(folder, {"w": torch.ones(2)}, structure, {"a": 1})
    found = locate(folder)
    version = checkpoint.read_training(found)["a"]
    assert checkpoint.read_weights(found)["w"].tolist() == [version] * 2
    recover(run)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "last"]
    assert checkpoint.read_training(marked(run, "last")) == {"a": version}


def test_another_save_does_not_lose_what_a_kill_left(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    structure = checkpoint.structure_of({"name": "x", "kwargs": {}}, "digits", None, [], [])
    checkpoint.save(folder, {"w": torch.zeros(2)}, structure)
    for _ in range(2):  # the second one begins without a folder of the name
        with monkeypatch.context() as broken, pytest.raises(Killed):
            killed_at(broken, "replace", 2)
            checkpoint.save(folder, {"w": torch.ones(2)}, structure)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="disk full"):

        def full(*arguments):
            raise OSError("disk full")

        broken.setattr(checkpoint_files.safetensors.torch, "save_file", full)
        checkpoint.save(folder, {"w": torch.ones(2)}, structure)
    assert checkpoint.read_weights(folder)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_marked_checkpoints_outlive_a_kill_of_the_deletion(tmp_path, monkeypatch, count):
    for number in range(1, 7):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "file").write_text("x")
    mark(tmp_path, "last", "checkpoint-6")
    mark(tmp_path, "best", "checkpoint-2")
    deleted = []

    def part_of(path, ignore_errors=False):
        deleted.append(path)
        if path.exists():
            (path / "file").unlink(missing_ok=True)
            if len(deleted) >= count:
                raise Killed
            path.rmdir()

    with monkeypatch.context() as broken, suppress(Killed):
        broken.setattr(shutil, "rmtree", part_of)
        drop_old(tmp_path, 2)
    for path in tmp_path.glob("checkpoint-*"):
        assert (path / "file").exists()
    recover(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"last", "best", "checkpoint-2", "checkpoint-5", "checkpoint-6"}
    assert not any(name.startswith(".") for name in names)
    if count == 99:
        assert len(names) == 5


def test_recovery_touches_nothing_of_the_users(tmp_path):
    for name in (".notes.tmp", "old.tmp", ".git", ".checkpoint-x.tmp", "summary.csv.tmp"):
        (tmp_path / name).write_text("x")
    before = sorted(tmp_path.iterdir())
    for name in (".last.tmp", ".summary.json.tmp", ".args.yaml.tmp"):
        (tmp_path / name).write_text("x")
    recover(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
