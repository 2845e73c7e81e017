import csv
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from layerprune import models
from layerprune.evidence import EvidenceQueue
from layerprune.training import data, loop, recipe
from layerprune.training.assembly import learning_rate_factor
from layerprune.training.checkpoint import load_model
from layerprune.training.engine import train
from layerprune.training.evaluation import evaluate
from layerprune.training.loop import TrainingDiverged
from layerprune.training.recipe import RecipeError
from layerprune.training.records import read_run
from layerprune.training.runfolder import RunFolderError
from layerprune.training.sampling import train_loader

CPU = torch.device("cpu")


def test_the_dense_control_is_plain_pytorch(small, tmp_path):
    small = replace(small, prune=False, epochs=3, sched="multistep", decay_milestones=(2,), seed=5)
    summary = train(small, None, tmp_path / "run", progress=False, device="cpu")

    torch.manual_seed(5)
    model = models.build("resnet20", width=4, num_classes=10, in_channels=1, image_size=8)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    splits = data.load("digits", train_subset=640)
    step = 0
    for epoch in range(3):
        model.train()
        for images, labels in train_loader(splits, 64, seed=5, epoch=epoch, drop_last=True):
            factor = (step + 1) / 11 if step < 10 else 1.0 if step < 20 else 0.1
            optimizer.param_groups[0]["lr"] = 0.05 * factor
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            step += 1
    model.eval()

    trained, _ = load_model(tmp_path / "run")
    assert trained.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(trained.state_dict()[name], tensor), name
    images, labels = splits.test.batch(range(360))
    expected = (model(images).argmax(1) == labels).float().mean().item()
    assert summary["accuracy"] == pytest.approx(expected)
    assert summary["train_flops_fraction"] == summary["inference_flops_fraction"] == 1
    assert summary["sections_kept"] == summary["sections_total"] == 9


def test_a_pruned_run_and_what_it_leaves(small, tmp_path):
    summary = train(small, None, tmp_path, progress=False, device="cpu", checkpoint_hist=99)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    record = read_run(tmp_path)
    assert len(record.epochs) == 6
    assert (tmp_path / "report.html").stat().st_size > 1000

    removed = [e for e in record.events if e["decision"] in ("eliminated", "rounded-off")]
    kept = [part for part in summary["architecture"] if part["kept"]]
    assert removed, "the recipe is to remove sections"
    assert summary["sections_kept"] == len(kept) == 9 - len(removed)
    assert summary["first_elimination_fraction"] == removed[0]["step"] / 60
    assert summary["decided_by_test"] + summary["decided_by_rounding"] == 9
    assert summary["verify_max_abs_difference"] == 0
    assert summary["phases"]["total_steps"] == 60
    assert 0 < summary["train_flops_fraction"] < 1
    assert 0 < summary["train_seconds"] < summary["seconds"]

    # The FLOPs that went are those of the sections that went.
    dense = summary["inference_flops"] / summary["inference_flops_fraction"]
    gone = sum(part["flops"] for part in summary["architecture"] if not part["kept"])
    assert summary["inference_flops"] == pytest.approx(dense - gone)

    # Every checkpoint, also one with undecided sections, gives what its epoch's row says.
    splits = data.load("digits")
    for row in record.epochs:
        model, _ = load_model(tmp_path / f"checkpoint-{row['step']}")
        assert evaluate(model, splits, CPU) == (row["test_loss"], row["test_accuracy"])
    model, structure = load_model(tmp_path)
    assert evaluate(model, splits, CPU) == (summary["test_loss"], summary["accuracy"])
    assert len(structure["eliminated"]) == len(removed)

    # The best checkpoint is one of cool-down.
    cooling = [row for row in record.epochs if row["step"] >= summary["phases"]["learning_end"]]
    best = max(cooling, key=lambda row: row["test_accuracy"])
    assert (tmp_path / "best").read_text() == f"checkpoint-{best['step']}\n"


def test_old_checkpoints_go_but_not_the_best(small, tmp_path):
    train(replace(small, epochs=4, prune=False), None, tmp_path, progress=False, device="cpu")
    there = {path.name for path in tmp_path.glob("checkpoint-*")}
    best = (tmp_path / "best").read_text().strip()
    assert there == {"checkpoint-30", "checkpoint-40", best}
    assert (tmp_path / "last").read_text() == "checkpoint-40\n"
    assert not list(tmp_path.glob(".*"))


def test_sections_left_out_from_the_start(small, tmp_path):
    without = ("block1_1", "block2_1")
    control = replace(small, prune=False, without=without, epochs=1, warmup_epochs=0)
    summary = train(control, None, tmp_path, progress=False, device="cpu")
    kept = [part["name"] for part in summary["architecture"] if part["kept"]]
    assert len(kept) == 7 and not set(kept) & set(without)
    assert summary["train_flops_fraction"] == summary["inference_flops_fraction"] < 1
    model, _ = load_model(tmp_path)
    assert not any(name.startswith(f"{without[0]}.") for name in model.state_dict())


@pytest.mark.parametrize("prune", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run(small, tmp_path, monkeypatch, prune):
    def poisoned(*arguments, epoch, **options):
        for images, labels in train_loader(*arguments, epoch=epoch, **options):
            yield images * (math.nan if epoch == 2 else 1), labels

    monkeypatch.setattr(loop, "train_loader", poisoned)
    with pytest.raises(TrainingDiverged, match=r"step 21.*checkpoint-20.*lr") as stopped:
        train(replace(small, prune=prune), None, tmp_path, progress=False, device="cpu")
    assert isinstance(stopped.value, FloatingPointError)
    model, _ = load_model(tmp_path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_gradients_that_are_not_finite_are_not_saved(small, tmp_path, monkeypatch):
    """Of an epoch's last step, whose loss was: nobody would have looked before the next one."""

    def refuse(self):
        raise FloatingPointError("a gate's gradient is not finite in step 10")

    monkeypatch.setattr(EvidenceQueue, "state_dict", refuse)
    with pytest.raises(TrainingDiverged, match="not finite in step 10; there is no checkpoint yet"):
        train(small, None, tmp_path, progress=False, device="cpu")
    assert not list(tmp_path.glob("checkpoint*"))


def test_the_learning_rate(small):
    ten = replace(small, epochs=10, warmup_epochs=2)
    cosine = learning_rate_factor(ten, 5)
    rising = [cosine(step) for step in range(11)]
    assert all(low < high for low, high in zip(rising, rising[1:], strict=False))
    assert (cosine(10), cosine(30), cosine(50)) == pytest.approx((1, 0.5, 0))
    steps = learning_rate_factor(replace(ten, sched="multistep", decay_milestones=(4, 8)), 5)
    assert [steps(step) for step in (19, 20, 39, 40)] == pytest.approx([1, 0.1, 0.1, 0.01])
    constant = learning_rate_factor(replace(ten, sched="constant"), 5)
    assert constant(49) == 1


@pytest.mark.parametrize("opt", ["adam", "adamw"])
def test_other_optimizers_train_and_shrink(small, tmp_path, opt):
    adaptive = replace(small, opt=opt, lr=1e-3, nesterov=False, channels_last=opt == "adam")
    summary = train(adaptive, None, tmp_path, progress=False, device="cpu")
    assert summary["sections_kept"] < 9
    assert summary["verify_max_abs_difference"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_args": {"depth": 3}}, "no argument depth"),
        ({"model_args": {"width": "wide"}}, "small"),
        ({"model": "vgg16", "model_args": {}}, "image_size"),
        ({"batch_size": 2000, "train_subset": None}, "batch_size 2000"),
        ({"train_subset": 64, "epochs": 2}, "total_steps = 2"),
    ],
)
def test_a_recipe_that_does_not_go_with_the_data_leaves_nothing(small, tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        train(replace(small, **changes), None, tmp_path / "run", progress=False, device="cpu")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_taken(small, tmp_path):
    run = tmp_path / "run"
    short = replace(small, prune=False, epochs=1, warmup_epochs=0)
    train(short, None, run, progress=False, device="cpu")
    before = (run / "summary.csv").read_bytes()
    with pytest.raises(RunFolderError, match="already holds a run"):
        train(short, None, run, progress=False, device="cpu")
    with pytest.raises(RunFolderError, match=r"lr \(0.05, now 0.1\), seed \(0, now 1\)"):
        train(replace(short, lr=0.1, seed=1), None, run, resume=True, progress=False)
    with pytest.raises(RunFolderError, match="holds no run"):
        train(short, None, tmp_path / "none", resume=True, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not an empty folder"):
        train(short, None, tmp_path / "other", progress=False)
    with pytest.raises(RecipeError, match="device 'abacus'"):
        train(short, None, tmp_path / "new", progress=False, device="abacus")
    assert (run / "summary.csv").read_bytes() == before


def test_the_tables_have_a_row_an_epoch_and_theta_of_every_section(small, tmp_path):
    train(recipe.override(small, epochs=3), None, tmp_path, progress=False, device="cpu")
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["10", "20", "30"]
    record = read_run(tmp_path)
    assert record.theta.shape == (30, 9)
    last = rows[-1]
    assert float(last["mean_theta"]) == pytest.approx(record.theta[-1].mean(), abs=1e-5)
