"""Thousands of steps: what is held does not grow, between eliminations and through them."""

import gc
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from layerprune import GatedResidual, LayerPruner
from layerprune.training.interrupt import StopRequest
from layerprune.training.loop import Loop
from layerprune.training.records import read_run
from layerprune.training.runlog import RunLog

STEPS, WINDOW, EVERY = 2000, 200, 10


class _Saved:
    """A tensor that a graph has saved, where Python can see it."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def alive():
    """Counts the tensors made since, and their bytes; the collector of cycles does not help."""
    gc.collect()
    gc.freeze()
    gc.disable()

    def count():
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return len(tensors), sum(storages.values())

    yield count
    gc.enable()
    gc.unfreeze()


def _model():
    torch.manual_seed(0)
    sections = [GatedResidual(nn.Sequential(nn.Linear(8, 8), nn.Tanh())) for _ in range(6)]
    return nn.Sequential(nn.Linear(3, 8), *sections, nn.Linear(8, 2))


def _bytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _saved_size(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return len(buffer.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_what_is_held_does_not_grow(alive, kind):
    """Some sections leave early and late, some stay and are measured time and again."""
    model, parts, averaged = _model(), 1, None
    scaler = torch.amp.GradScaler("cpu", growth_interval=50, enabled=kind == "everything")
    if kind == "everything":
        parts, averaged = 2, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = LayerPruner(
        model,
        example_inputs=torch.zeros(2, 3),
        total_steps=STEPS,
        strength=0.002,
        ema=averaged,
    )
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    dense = _bytes(model.parameters())
    seen, state_sizes, changes = [], [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        with torch.autograd.graph.saved_tensors_hooks(_Saved, lambda saved: saved.tensor):
            for _ in range(parts):
                x = torch.randn(16, 3, generator=generator)
                loss = (model(x) - x[:, :2].sin()).square().mean() / parts
                scaler.scale(loss).backward()
        scaler.step(optimizer)
        changes += [step] * pruner.step(optimizer, scaler, parts).changed
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        if averaged is not None:
            averaged.update_parameters(model)
        del loss, x
        if step % EVERY == 0:
            seen.append(alive())
        if step % (4 * EVERY) == 0:
            state_sizes.append(_saved_size(pruner.state_dict()))

    kept = [info for info in pruner.sections if info.status != "eliminated"]
    assert len(changes) >= 2 and len(kept) >= 2 and len(pruner.events) > 6
    # Of windows of steps: what is held in between measurements, and what at the most.
    windows = [seen[at : at + WINDOW // EVERY] for at in range(0, len(seen), WINDOW // EVERY)]
    for what in range(2):
        floors = [min(counts[what] for counts in window) for window in windows[1:]]
        peaks = [max(counts[what] for counts in window) for window in windows[1:]]
        assert floors == sorted(floors, reverse=True)
        assert max(peaks) <= 1.05 * peaks[0]  # samples miss a measurement under way, or catch it
    # What left took its moments, and its average, along.
    gone = dense - _bytes(model.parameters())
    copies = 3 if averaged is None else 4
    assert gone > 0
    assert seen[WINDOW // EVERY][1] - seen[-1][1] >= copies * gone
    # A number more a step, of whatever kind, would take two bytes at the least.
    early = state_sizes[WINDOW // 40 : 2 * WINDOW // 40]
    assert max(state_sizes) - max(early) < 1500
    assert len(pruner.events) <= 8 * len(pruner.sections)


class _Pruner:
    """Thetas that move."""

    ledger = SimpleNamespace(fraction=1.0)
    step = 0

    @property
    def sections(self):
        self.step += 1
        return [SimpleNamespace(theta=self.step % 7 / 7, status="open") for _ in range(3)]


def _log(folder, steps):
    """What a run of so many steps logs in one epoch; bytes of each of its files."""
    session = SimpleNamespace(
        recipe=SimpleNamespace(smoothing=0.0),
        network=SimpleNamespace(total_steps=steps),
        place=SimpleNamespace(step=0),
        pruner=_Pruner(),
    )
    with RunLog(folder, ["a", "b", "c"]) as log:
        loop = Loop(session, None, log, StopRequest(), progress=False, keep=1)
        for _ in range(steps):
            session.place.step += 1
            loop._note_step(())
        log.log_epoch({"epoch": 1, "step": steps})
    return {p.name.split(".")[0]: p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def test_log_files_do_not_grow_with_the_steps(tmp_path):
    """The steps of a run are thinned out in its records; decisions are few, epochs are counted."""
    short, long = (_log(tmp_path / str(steps), steps) for steps in (500, 20_000))
    assert short.keys() == long.keys()
    for name, size in long.items():
        assert size < 1.2 * short[name] + 10, name
    steps = read_run(tmp_path / "20000").theta_steps
    assert len(steps) == 500 and steps[-1] == 20_000
