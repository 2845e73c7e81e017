"""A resumed run equals the uninterrupted one bit for bit, wherever it was stopped."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
from runs import assert_same_runs

from layerprune.training import loop
from layerprune.training.engine import train
from layerprune.training.interrupt import Interrupted
from layerprune.training.records import read_run
from layerprune.training.runfolder import CheckpointError, RunFolderError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs each recipe once, uninterrupted, keeping a checkpoint an epoch."""
    runs = {}

    def run(recipe):
        key = json.dumps(recipe.as_dict())
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("whole") / "run"
            train(recipe, None, runs[key], progress=False, device="cpu", checkpoint_hist=99)
        return runs[key]

    return run


def stopped_at(monkeypatch, step):
    """Ctrl-C while the given step is under way."""
    original = loop.Loop._step

    def interrupted(self, *batch):
        if self.session.place.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        return original(self, *batch)

    monkeypatch.setattr(loop.Loop, "_step", interrupted)


def resumed(recipe, folder):
    return train(
        recipe, None, folder, resume=True, progress=False, device="cpu", checkpoint_hist=99
    )


def eliminations(run):
    events = read_run(run).events
    return [e["step"] for e in events if e["decision"] in ("eliminated", "rounded-off")]


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_killed_after_any_epoch(small, whole, tmp_path, opt):
    small = replace(small, opt=opt, nesterov=opt == "sgd", lr=0.05 if opt == "sgd" else 0.003)
    run = whole(small)
    steps = [10, 20, 30, 40, 50]
    assert min(eliminations(run)) < 40, "sections are to go before some of the checkpoints"
    for step in steps[:: 1 if opt == "sgd" else 3]:
        copy = shutil.copytree(run, tmp_path / str(step))
        for later in range(step + 10, 70, 10):
            shutil.rmtree(copy / f"checkpoint-{later}")
        shutil.rmtree(copy / "model")
        (copy / "best").unlink()
        (copy / "last").write_text(f"checkpoint-{step}\n")
        with open(copy / "events.jsonl", "a") as file:
            file.write('{"step": 60, "sec')  # the line it was killed in
        resumed(small, copy)
        assert_same_runs(run, copy)


def test_killed_while_the_last_checkpoint_was_replaced(small, whole, tmp_path):
    """Between the two renames it has only its other name, and what was written lies beside it."""
    run = whole(small)
    copy = shutil.copytree(run, tmp_path / "run")
    last = copy / "checkpoint-40"
    for name in ("checkpoint-50", "checkpoint-60", "model"):
        shutil.rmtree(copy / name)
    (copy / "best").unlink()
    (copy / "last").write_text(f"{last.name}\n")
    shutil.copytree(last, copy / f".{last.name}.tmp")
    last.rename(copy / f".{last.name}.old")
    resumed(small, copy)
    assert_same_runs(run, copy)
    assert not [path.name for path in copy.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("where", ["before", "at", "after", "learning's end", "cool-down"])
def test_stopped_in_the_middle_of_an_epoch(small, whole, tmp_path, monkeypatch, where):
    run = whole(small)
    first = min(eliminations(run))
    step = {
        "before": first - 1,
        "at": first,
        "after": first + 3,
        "learning's end": read_run(run).summary["phases"]["learning_end"],
        "cool-down": 53,
    }[where]
    with monkeypatch.context() as patch:
        stopped_at(patch, step)
        with pytest.raises(Interrupted) as stop:
            train(small, None, tmp_path / "run", progress=False, device="cpu", checkpoint_hist=99)
    assert stop.value.step == step
    assert f"checkpoint-{step}\n" == (tmp_path / "run" / "last").read_text()
    resumed(small, tmp_path / "run")
    assert_same_runs(run, tmp_path / "run")


def test_stopped_at_an_epochs_last_step_and_in_the_first(small, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for step, resume in ((3, False), (20, True)):
        with monkeypatch.context() as patch:
            stopped_at(patch, step)
            with pytest.raises(Interrupted):
                train(
                    small,
                    None,
                    folder,
                    resume=resume,
                    progress=False,
                    device="cpu",
                    checkpoint_hist=99,
                )
        assert len(read_run(folder).epochs) == step // 10
    resumed(small, folder)
    assert_same_runs(whole(small), folder)


def test_stopped_dense_run(small, whole, tmp_path, monkeypatch):
    dense = replace(small, prune=False, epochs=2)
    with monkeypatch.context() as patch:
        stopped_at(patch, 14)
        with pytest.raises(Interrupted):
            train(dense, None, tmp_path / "run", progress=False, device="cpu")
    resumed(dense, tmp_path / "run")
    assert_same_runs(whole(dense), tmp_path / "run")


def test_stopped_before_the_first_checkpoint_begins_again(small, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def crash(*arguments):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(small, None, folder, progress=False, device="cpu")
    resumed(small, folder)
    assert_same_runs(whole(small), folder)


def test_a_finished_run_may_be_finished_again(small, whole, tmp_path):
    copy = shutil.copytree(whole(small), tmp_path / "run")
    (copy / "summary.json").unlink()
    resumed(small, copy)
    assert_same_runs(whole(small), copy)


def test_workers_may_change(small, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopped_at(patch, 13)
        with pytest.raises(Interrupted):
            train(small, None, folder, progress=False, device="cpu", checkpoint_hist=99)
    resumed(replace(small, workers=1), folder)
    assert_same_runs(whole(small), folder)


@pytest.fixture
def stopped(small, tmp_path, monkeypatch):
    """A run that was stopped in its third epoch."""
    with monkeypatch.context() as patch:
        stopped_at(patch, 27)
        with pytest.raises(Interrupted):
            train(small, None, tmp_path / "run", progress=False, device="cpu", checkpoint_hist=99)
    return tmp_path / "run"


def _content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_without_a_marker_the_newest_checkpoint_is_gone_on_from(small, whole, stopped):
    """Its process was killed before it could mark it, or somebody took the marker away."""
    (stopped / "last").unlink()
    resumed(small, stopped)
    assert_same_runs(whole(small), stopped)


def test_a_marker_that_is_none_is_refused(small, stopped):
    (stopped / "last").unlink()
    (stopped / "last").mkdir()
    before = _content(stopped)
    with pytest.raises(CheckpointError, match="last is a folder"):
        resumed(small, stopped)
    assert _content(stopped) == before


@pytest.mark.parametrize("name", ["summary.csv", "events.jsonl", "theta.csv"])
@pytest.mark.parametrize("damage", ["gone", "cut", "spoilt"])
def test_lost_rows_are_missed_before_anything_is_trained(small, stopped, name, damage):
    """The summary and the report are made of them."""
    path = stopped / name
    lines = path.read_text().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        path.write_text("".join(lines[:-1]) + ("x,y\n" if damage == "spoilt" else ""))
    before = _content(stopped)
    with pytest.raises(RunFolderError, match=name):
        resumed(small, stopped)
    assert _content(stopped) == before


def test_settings_edited_in_the_folder_are_not_the_runs(small, stopped):
    """The checkpoint knows what it was trained with."""
    path = stopped / "args.yaml"
    path.write_text(path.read_text().replace(f"lr: {small.lr}", "lr: 0.033"))
    with pytest.raises(RunFolderError, match="lr .*now 0.033"):
        resumed(replace(small, lr=0.033), stopped)
