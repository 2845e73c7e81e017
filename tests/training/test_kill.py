"""A run that is killed, at whatever moment, goes on as if it had not been."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import start
from runs import assert_same_runs

from layerprune.training import recipe
from layerprune.training.engine import train
from layerprune.training.records import read_run
from layerprune.training.runfolder import holds_run

KILLS = 20
GONE = ("eliminated", "rounded-off")
SETTINGS = {
    "dataset": "digits",
    "model": "resnet20",
    "model_args": {"width": 2},
    "train_subset": 320,
    "epochs": 4,
    "batch_size": 32,
    "opt": "adamw",
    "lr": 0.01,
    "strength": 0.1,
    "checkpoint_steps": 3,
}
VARIANTS = (
    {},
    {
        "batch_size": 16,
        "grad_accum_steps": 2,
        "clip_grad": 1.0,
        "amp": True,
        "amp_dtype": "float16",
        "model_ema": True,
        "model_ema_decay": 0.9,
    },
)


# Calls during which a run is killed, and the range of how many of them it makes before.
CALLS = (
    ({"save", "save_file"}, (1, 12)),
    ({"replace", "fsync", "rmtree"}, (1, 100)),
    ({"replace", "rmtree"}, (1, 40)),
)


def go_on(folder, variant, calls=(), last=0):
    """Begins or resumes the run; it is killed in the last of so many of the calls."""
    settings = recipe.from_mapping({"name": "tiny"} | SETTINGS | VARIANTS[variant], "tiny")
    _die_in(calls, last)
    folder = Path(folder)
    train(settings, None, folder, resume=holds_run(folder), device="cpu", progress=False)


def _die_in(calls, last):
    made = 0

    def counted(module, name, half=None):
        original = getattr(module, name)

        def call(*args, **kwargs):
            nonlocal made
            made += name in calls
            if made == last and name in calls:
                if half is not None:
                    half(original, *args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, call)

    counted(os, "replace")
    counted(os, "fsync")
    counted(torch, "save", _half_a_file)
    counted(safetensors.torch, "save_file", _half_a_file)
    counted(shutil, "rmtree", _half_a_folder)


def _half_a_file(save, content, path):
    save(content, path)
    os.truncate(path, os.path.getsize(path) // 2)


def _half_a_folder(remove, path, **options):
    if Path(path).is_dir():
        for some in sorted(Path(path).iterdir())[::2]:
            some.unlink()


def ended(process):
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    chance = random.Random(0)
    wholes = [tmp_path / f"whole{variant}" for variant in range(len(VARIANTS))]
    seconds = []
    for variant, whole in enumerate(wholes):
        begin = time.monotonic()
        assert ended(start(go_on, str(whole), variant)) == 0
        seconds.append(time.monotonic() - begin)
        gone = [e["step"] for e in read_run(whole).events if e["decision"] in GONE]
        assert len(gone) >= 2 and gone[0] < 30, "sections are to go in the middle of the run"
    kills = finished = 0
    while kills < KILLS:
        # A run is killed and resumed until it comes to its end.
        variant = finished % len(VARIANTS)
        run = tmp_path / f"run{finished}"
        while True:
            how = None if kills >= KILLS else kills % 4
            calls, bounds = CALLS[how] if how in range(len(CALLS)) else ((), (0, 0))
            process = start(go_on, str(run), variant, calls, chance.randint(*bounds))
            if how == len(CALLS):
                process.join(chance.uniform(0, seconds[variant]))
                process.kill()
            code = ended(process)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        assert_same_runs(wholes[variant], run)
        assert not list(run.glob(".*")), "nothing half-written stays"
        finished += 1
