"""Runs on two ranks: resumed bit for bit, agreed on when they stop, ended when one fails."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_ranks
from runs import assert_same_runs
from torch import distributed as dist

from layerprune import load
from layerprune.training import data, loop, recipe
from layerprune.training.engine import train
from layerprune.training.evaluation import evaluate
from layerprune.training.interrupt import Interrupted
from layerprune.training.loop import TrainingDiverged
from layerprune.training.recipe import RecipeError
from layerprune.training.records import read_run
from layerprune.training.runfolder import CheckpointError
from layerprune.training.sampling import train_loader

SETTINGS = {
    "name": "tiny",
    "dataset": "digits",
    "model": "resnet20",
    "model_args": {"width": 2},
    "train_subset": 320,
    "epochs": 5,
    "batch_size": 32,
    "opt": "adamw",
    "lr": 0.01,
    "strength": 0.1,
    "model_ema": True,
    "model_ema_decay": 0.9,
}
TINY = recipe.from_mapping(SETTINGS, "tiny")
ACCUMULATED = replace(TINY, batch_size=16, grad_accum_steps=2, clip_grad=1.0)
ROOT = Path(__file__).resolve().parents[2]


def at_step(step, act):
    """Does something while the given step is under way."""
    original = loop.Loop._step

    def acting(self, *batch):
        if self.session.place.step + 1 == step:
            loop.Loop._step = original
            act()
        return original(self, *batch)

    loop.Loop._step = acting


def go_on(settings, folder, resume=False):
    return train(settings, None, folder, resume=resume, device="cpu", progress=False)


def whole_and_stopped(rank, settings, folder):
    """One run without a break, and one that a signal to one of the ranks ends now and then."""
    summary = go_on(settings, folder / "whole")
    dist.barrier()  # rank 0 writes until it comes here
    events = read_run(folder / "whole").events
    gone = [e["step"] for e in events if e["decision"] in ("eliminated", "rounded-off")]
    stops = [gone[0] - 1, gone[0], (gone[0] + gone[-1]) // 2, gone[-1] + 1]
    codes = []
    for number, step in enumerate(stops):
        sent = (signal.SIGINT, signal.SIGTERM)[number % 2]
        if rank == number % 2:
            at_step(step, lambda sent=sent: signal.raise_signal(sent))
        with pytest.raises(Interrupted) as stopped:
            go_on(settings, folder / "stopped", resume=number > 0)
        codes.append((stopped.value.step, stopped.value.exit_code))
    go_on(settings, folder / "stopped", resume=True)
    return summary, stops, codes


@pytest.mark.slow
@pytest.mark.parametrize("settings", [TINY, ACCUMULATED], ids=["plain", "accumulated"])
def test_stopped_runs_equal_the_whole_one(tmp_path, settings):
    (summary, stops, codes), (nothing, _, others) = run_ranks(
        whole_and_stopped, 2, settings, tmp_path
    )
    assert len(set(stops)) == len(stops), "stops are to lie before, between and after eliminations"
    assert codes == others == list(zip(stops, (130, 143, 130, 143), strict=True))
    assert_same_runs(tmp_path / "whole", tmp_path / "stopped")
    assert nothing == {} and summary == json.loads((tmp_path / "whole/summary.json").read_text())

    # The figures are those of one process that sees all rows.
    last = read_run(tmp_path / "whole").epochs[-1]
    splits = data.load("digits")
    for folder, key in (("model", "test"), ("model-ema", "ema")):
        model = load(tmp_path / "whole" / folder)
        found = evaluate(model, splits, torch.device("cpu"))
        assert found == (last[f"{key}_loss"], last[f"{key}_accuracy"])
    dense = summary["inference_flops"] / summary["inference_flops_fraction"]
    assert summary["dense_train_flops"] == pytest.approx(3 * dense * 320 * 5)
    assert 0 < summary["train_flops_fraction"] < 1

    with pytest.raises(CheckpointError, match="run of 2 ranks and cannot go on with 1"):
        go_on(settings, tmp_path / "whole", resume=True)


@pytest.mark.parametrize("start", [0, 2])
def test_the_ranks_parts_are_the_batches_of_one(start):
    splits = data.load("digits", train_subset=320)
    options = {"seed": 3, "epoch": 1, "start_batch": start, "drop_last": True}
    whole = list(train_loader(splits, 32, **options))
    parts = [list(train_loader(splits, 32, **options, part=(n, 4))) for n in range(4)]
    assert all(len(part) == len(whole) == 10 - start for part in parts)
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert all(len(labels) == 8 for _, labels in pieces)
        for kind in range(2):
            assert torch.equal(batch[kind], torch.cat([piece[kind] for piece in pieces]))


def refusals(rank, folder):
    words = []
    for changes in ({"batch_size": 33}, {"batch_size": 6}):
        with pytest.raises(RecipeError) as refused:
            go_on(replace(TINY, **changes), folder / "run")
        words.append(str(refused.value))
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "thesis.tex").touch()
    try:
        go_on(TINY, folder / "taken")
    except Exception as error:
        return [*words, type(error).__name__]


def test_what_two_ranks_cannot_do_is_refused_on_both(tmp_path):
    first, second = run_ranks(refusals, 2, tmp_path)
    assert "batch_size 33" in first[0] and "all 2 ranks" in first[0]
    assert "3 images, less than min_rows (4)" in first[1]
    assert first[:2] == second[:2]
    assert (first[2], second[2]) == ("RunFolderError", "FirstRankFailed")
    assert not (tmp_path / "run").exists()


def diverging(rank, folder):
    if rank == 1:
        original = loop.train_loader

        def poisoned(*arguments, epoch, **options):
            for images, labels in original(*arguments, epoch=epoch, **options):
                yield images * (math.nan if epoch == 1 else 1), labels

        loop.train_loader = poisoned
    with pytest.raises(TrainingDiverged) as stopped:
        go_on(replace(TINY, prune=False), folder)
    return str(stopped.value)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path):
    first, second = run_ranks(diverging, 2, tmp_path / "run")
    assert first == second
    assert "step 11" in first and "checkpoint-10" in first


def dying(rank, folder):
    if rank == 1:
        at_step(14, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError):
        go_on(TINY, folder)
    return (folder / "last").read_text()


def test_a_rank_that_dies_ends_the_run_of_the_other(tmp_path):
    last, _ = run_ranks(dying, 2, tmp_path / "run", lost=(1,))
    assert last == "checkpoint-10\n"


@pytest.mark.slow
def test_torchrun_hands_a_signal_on(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS | {"epochs": 1000}))
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "layerprune", "train", "tiny.yaml", "--device", "cpu", "--output", "run"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        patience = time.monotonic() + 120
        while not (output / "last").exists() and process.poll() is None:
            assert time.monotonic() < patience
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    step = int((output / "last").read_text().strip().partition("-")[2])
    assert printed.count(f"stopped after step {step}; go on with: ") == 1, printed
    assert "Traceback" not in printed.partition("stopped after")[0]
    assert len(read_run(output).epochs) == step // 10
