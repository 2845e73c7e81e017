import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("typer")

import layerprune
from layerprune.cli import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "dataset": "digits",
    "model": "resnet20",
    "model_args": {"width": 4},
    "train_subset": 640,
    "epochs": 3,
    "batch_size": 64,
    "lr": 0.05,
    "strength": 0.3,
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


@pytest.fixture
def run(capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / "small.yaml"), "--output", str(folder / "run")])
    assert stopped.value.code == 0
    return folder / "run"


def test_train_then_eval_verify_report(run, finished, tmp_path):
    accuracy = json.loads((finished / "summary.json").read_text())["accuracy"]
    for path in (finished, finished / "last", finished / "model"):
        code, out, _ = run("eval", path)
        assert code == 0 and f"accuracy {accuracy:.4f}" in out
    code, out, _ = run("verify", finished)
    assert code == 0 and "360 test images: 0\n" in out
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "report.html").unlink()
    code, out, _ = run("report", copy, "--baseline", finished)
    assert (code, out.strip()) == (0, str(copy / "report.html"))
    assert "dense" in (copy / "report.html").read_text()


def test_verify_tells_a_difference(run, finished, monkeypatch):
    from layerprune.training import inspection

    monkeypatch.setattr(inspection, "compaction_difference", lambda *arguments: 1e-7)
    code, out, _ = run("verify", finished)
    assert code == 1 and "1e-07" in out


def test_verify_takes_any_checkpoint(run, finished, tmp_path, monkeypatch):
    """One of a run under way, one without its data, one of somebody's own loop."""
    for path in (finished / "checkpoint-20", finished / "last"):
        code, out, err = run("verify", path)
        assert (code, out, err) == (0, "largest difference over 360 test images: 0\n", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "from layerprune import GatedResidual\n"
        "def network():\n"
        "    return nn.Sequential(*(GatedResidual(nn.Linear(3, 3)) for _ in range(4)))\n"
    )
    example = torch.ones(5, 3)
    blocks = (layerprune.GatedResidual(torch.nn.Linear(3, 3)) for _ in range(4))
    pruner = layerprune.LayerPruner(
        torch.nn.Sequential(*blocks), example_inputs=example, total_steps=99, strength=0.1
    )
    pruner._run.bank.theta[1] = 0.2
    layerprune.save("mine", pruner, example_inputs=example)
    code, out, err = run("verify", "mine", "--builder", "own:network")
    assert (code, err) == (0, "") and "over 4 random batches: 0\n" in out
    assert "names no known data set: random inputs" in out
    for arguments, words in (
        (["mine"], "names no builder"),
        (["mine", "--builder", "own:nothing"], "own:nothing"),
        (["mine", "--builder", "own"], "MODULE:FUNCTION"),
        (["mine", "--builder", "own:nn"], "no function"),
        (["mine", "--data-dir", "."], "names no known data set"),
    ):
        code, out, err = run("verify", *arguments)
        assert code == 2 and err.count("\n") == 1 and words in err
    code, _, err = run("eval", "mine")
    assert code == 2 and "names no builder" in err
    layerprune.save("mine", pruner)
    code, _, err = run("verify", "mine", "--builder", "own:network")
    assert code == 2 and "save it with example_inputs" in err
    layerprune.save("mine", pruner, example_inputs=torch.ones(5, 4))
    code, _, err = run("verify", "mine", "--builder", "own:network")
    assert code == 2 and "does not run on 4 random batches" in err and err.count("\n") == 1


def test_flags_override_the_recipe(run, recipe, tmp_path):
    output = tmp_path / "run"
    flags = "--epochs 1 --batch-size 32 --opt adam --lr 1e-3 --weight-decay 0 --strength 0.5"
    flags += " --cost latency --seed 4 --set looks=3 --set max_descending=null --set horizon=5e-2"
    code, _, err = run("train", recipe, "--output", output, *flags.split())
    assert (code, err) == (0, "")
    found = yaml.safe_load((output / "args.yaml").read_text())
    expected = {"epochs": 1, "batch_size": 32, "opt": "adam", "lr": 1e-3, "weight_decay": 0}
    expected |= {"strength": 0.5, "cost": "latency", "seed": 4, "prune": True, "name": "small"}
    expected["prune_config"] = {"looks": 3, "max_descending": None, "horizon": 5e-2}
    assert {key: found[key] for key in expected} == expected


def test_info_lists_what_there_is(run):
    code, out, _ = run("info")
    assert code == 0
    for word in ("torch", "python", "cpu", "digits-resnet32", "vgg16", "fashion-mnist"):
        assert word in out


def test_demo_twice(run, recipe, tmp_path):
    output = tmp_path / "demo"
    summaries = []
    for _ in range(2):
        code, out, _ = run("demo", "--recipe", recipe, "--output", output, "--epochs", 2)
        assert code == 0
        for words in ("accuracy", "sections", "parameters", "inference FLOPs", "training FLOPs"):
            assert words in out
        assert f"report: {output / 'pruned' / 'report.html'}" in out
        summaries.append(json.loads((output / "summary.json").read_text()))
    assert list(summaries[0]) == [
        "dense_accuracy",
        "accuracy",
        "sections_total",
        "sections_kept",
        "train_flops_fraction",
        "train_time_fraction",
        "inference_flops_fraction",
        "verify_max_abs_difference",
        "seed",
    ]
    first, second = ({k: v for k, v in s.items() if "time" not in k} for s in summaries)
    assert first == second
    for part in ("dense", "pruned"):
        one = json.loads((output / part / "summary.json").read_text())
        assert summaries[1]["accuracy" if part == "pruned" else "dense_accuracy"] == one["accuracy"]
    # What is no run of its own stays.
    shutil.rmtree(output / "dense")
    (output / "dense").mkdir()
    (output / "dense" / "letter.txt").write_text("x")
    code, _, err = run("demo", "--recipe", recipe, "--output", output)
    assert code == 2 and "dense" in err
    assert (output / "dense" / "letter.txt").exists() and (output / "pruned").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nope"], "digits-resnet32"),
        (["train", "nope.yaml"], "no such recipe file"),
        (["train", "RECIPE", "--dataset", "nope"], "unknown data set 'nope'"),
        (["train", "RECIPE", "--model", "nope"], "unknown model 'nope'"),
        (["train", "RECIPE", "--dataset", "mnist"], "mnist"),
        (["train", "RECIPE", "--dataset", "mnist", "--data-dir", "none"], "does not exist: none"),
        (["train", "RECIPE", "--dataset", "cifar10", "--data-dir", "."], "cifar-10-batches-py"),
        (["train", "RECIPE", "--epochs", "x"], "--epochs"),
        (["train", "RECIPE", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "RECIPE", "--strength", "-1"], "strength must be above 0"),
        (["train", "RECIPE", "--batch-size", "4000"], "batch_size"),
        (["train", "RECIPE", "--set", "horizon"], "KEY=VALUE"),
        (["train", "RECIPE", "--set", "nope=1"], "no setting nope"),
        (["train", "RECIPE", "--device", "abacus"], "abacus"),
        (["train", "RECIPE", "--output", "RUN"], "already holds a run"),
        (["train", "--resume"], "--output"),
        (["train", "--resume", "--output", "nothing"], "holds no run"),
        (["train", "--resume", "--output", "RUN", "--lr", "1"], "lr (0.05, now 1.0)"),
        (["eval", "nothing"], "nothing"),
        (["verify", "nothing"], "nothing"),
        (["report", "nothing"], "nothing"),
        (["demo", "--recipe", "nope"], "unknown recipe"),
        (["frobnicate"], "frobnicate"),
        (["train", "--frobnicate"], "--frobnicate"),
    ],
)
def test_mistakes_are_one_line(run, recipe, finished, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    places = {"RECIPE": recipe, "RUN": str(finished)}
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_checkpoints_are_one_line(run, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    weights = copy / "checkpoint-30" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for arguments in (["eval", copy / "last"], ["train", "--resume", "--output", copy]):
        code, _, err = run(*arguments)
        assert code == 2 and err.count("\n") == 1 and str(weights) in err
    structure = copy / "model" / "structure.json"
    structure.write_text(structure.read_text().replace("resnet20", "resnet32"))
    code, _, err = run("eval", copy)
    assert code == 2 and err.count("\n") == 1 and "checksum" in err
    (copy / "summary.json").write_text("{")
    code, _, err = run("report", copy)
    assert code == 2 and err.count("\n") == 1 and "summary.json" in err


def test_divergence_is_one_line(run, recipe, tmp_path):
    code, _, err = run("train", recipe, "--lr", "1e30", "--output", tmp_path / "run")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert "step" in err and "lr" in err


def test_an_error_while_loading_in_a_worker_is_one_line(run, tmp_path):
    for part in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "data" / part / label
            folder.mkdir(parents=True)
            for number in range(8):
                (folder / f"{number}.png").write_bytes(b"no image")
    path = tmp_path / "images.yaml"
    settings = {"dataset": "imagefolder", "model": "resnet20", "model_args": {"width": 1}}
    settings |= {"batch_size": 4, "workers": 1, "epochs": 2, "lr": 0.1, "prune": False}
    path.write_text(yaml.safe_dump(settings))
    arguments = ["--data-dir", tmp_path / "data", "--output", tmp_path / "run"]
    code, _, err = run("train", path, *arguments)
    assert code == 2 and err.count("\n") == 1 and ".png" in err


def _stopped_from_outside(output, number, *arguments):
    """Starts a run, waits for a checkpoint that is new, and signals all its processes."""
    marker = output / "last"
    before = marker.read_text() if marker.exists() else None
    process = subprocess.Popen(
        [sys.executable, "-m", "layerprune", "train", "--output", str(output), *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        patience = time.monotonic() + 120
        while process.poll() is None and (not marker.exists() or marker.read_text() == before):
            assert time.monotonic() < patience
            time.sleep(0.05)
        # As a terminal does it: to the data-loading process as well.
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    (line,) = err.decode().strip().splitlines()
    assert line.endswith(f"layerprune train --resume --output {output}")
    step = int(marker.read_text().strip().partition("-")[2])
    assert f"after step {step};" in line
    return process.returncode, step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_from_outside_then_resumed(recipe, tmp_path, number, code):
    output = tmp_path / "run"
    # Long enough to be caught in the middle on any machine.
    long = ("--epochs", "300", "--dense", "--workers", "1")
    first = _stopped_from_outside(output, number, recipe, *long)
    # The command that was printed does go on.
    second = _stopped_from_outside(output, number, "--resume")
    assert first[0] == second[0] == code and 0 < first[1] < second[1] < 3000
    assert len((output / "summary.csv").read_text().splitlines()) == 1 + second[1] // 10


def test_a_missing_extra_is_one_line():
    for missing in ("typer", "torchvision"):
        code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
from layerprune.cli import main
main(["info"])
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr == f"error: {missing} is missing: pip install layerprune[train]\n"
