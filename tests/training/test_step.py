"""Accumulation, clipping, mixed precision, averaging, compilation: each against plain PyTorch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from runs import assert_same_runs
from torch import nn

from layerprune import load, models
from layerprune.training import data, recipe
from layerprune.training.checkpoint import read_weights
from layerprune.training.engine import train
from layerprune.training.evaluation import evaluate
from layerprune.training.records import read_run
from layerprune.training.runfolder import EMA
from layerprune.training.sampling import train_loader

CPU = torch.device("cpu")


@pytest.fixture
def tiny(small):
    return replace(small, model_args={"width": 2}, train_subset=320, epochs=2, batch_size=32)


def plain(settings):
    """The dense run in a loop as people write it; the model, and its average if there is one."""
    torch.manual_seed(settings.seed)
    size = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    model = models.build(settings.model, **settings.model_args, **size).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    half = settings.amp_dtype == "float16"
    scaler = torch.amp.GradScaler("cpu", enabled=settings.amp and half)
    cast = partial(torch.autocast, "cpu", getattr(torch, settings.amp_dtype), settings.amp)
    splits = data.load("digits", train_subset=settings.train_subset)
    parts, average, micro = settings.grad_accum_steps, {}, 0
    for epoch in range(settings.epochs):
        for images, labels in train_loader(splits, settings.batch_size, seed=0, epoch=epoch):
            with cast():
                loss = F.cross_entropy(model(images), labels) / parts
            scaler.scale(loss).backward()
            micro += 1
            if micro % parts:
                continue
            if settings.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            decay = settings.model_ema_decay
            for name, tensor in model.state_dict().items():
                before = average.get(name, tensor)
                average[name] = decay * before + (1 - decay) * tensor
    return model.state_dict(), average


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 16, "grad_accum_steps": 2},
        {"clip_grad": 0.5},
        {"amp": True},
        {"amp": True, "amp_dtype": "float16", "clip_grad": 0.5},
        {"model_ema": True, "model_ema_decay": 0.8},
    ],
    ids=["accumulation", "clipping", "bfloat16", "float16", "average"],
)
def test_a_dense_run_is_plain_pytorch(tiny, tmp_path, changes):
    settings = replace(tiny, prune=False, warmup_epochs=0, sched="constant", **changes)
    summary = train(settings, None, tmp_path, progress=False, device="cpu")
    assert summary["phases"]["total_steps"] == 20
    weights, average = plain(settings)
    found = read_weights(tmp_path / "model")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name
    assert (tmp_path / "model-ema").exists() == settings.model_ema
    if settings.model_ema:
        found = read_weights(tmp_path / "model-ema")
        for name, tensor in average.items():
            if found[name].is_floating_point():  # numbers of batches are whole
                torch.testing.assert_close(found[name], tensor)


def test_the_average_is_compacted_along(tiny, tmp_path):
    settings = replace(tiny, epochs=4, model_ema=True, model_ema_decay=0.8)
    train(settings, None, tmp_path, progress=False, device="cpu")
    last = read_run(tmp_path).epochs[-1]
    assert last["sections_alive"] < 9
    model, average = load(tmp_path), load(tmp_path / "model-ema")
    assert model.state_dict().keys() == average.state_dict().keys()
    assert str(model) == str(average)
    found = evaluate(average, data.load("digits"), CPU)
    assert found == (last["ema_loss"], last["ema_accuracy"])
    assert found != (last["test_loss"], last["test_accuracy"])
    in_checkpoint = read_weights(tmp_path / f"checkpoint-{last['step']}", EMA)
    assert in_checkpoint.keys() == average.state_dict().keys()


def test_a_compiled_run_is_the_same(tiny, tmp_path, monkeypatch):
    train(tiny, None, tmp_path / "plain", progress=False, device="cpu")
    original, compiled = torch.compile, []

    def captured(model):
        # What is captured is run as it is: the same bits.
        compiled.append(model)
        return original(model, backend="eager")

    monkeypatch.setattr(torch, "compile", captured)
    settings = replace(tiny, compile=True)
    train(settings, None, tmp_path / "compiled", progress=False, device="cpu")
    assert len(compiled) == 1
    text = (tmp_path / "compiled" / "args.yaml").read_text()
    (tmp_path / "compiled" / "args.yaml").write_text(
        text.replace("compile: true", "compile: false")
    )
    assert_same_runs(tmp_path / "plain", tmp_path / "compiled")


def test_checkpoints_between_the_epochs_ends(tiny, tmp_path):
    settings = replace(tiny, checkpoint_steps=4)
    train(settings, None, tmp_path, progress=False, device="cpu", checkpoint_hist=99)
    steps = sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == [4, 8, 10, 12, 16, 20]


def test_a_recipes_step_takes_all_its_forwards(tiny):
    with pytest.raises(recipe.RecipeError, match="batch_size 32 times 11"):
        replace(tiny, grad_accum_steps=11)
