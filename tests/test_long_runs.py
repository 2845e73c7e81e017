"""Thousands of steps: what is held does not grow, between eliminations and through them."""

import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from layerprune import GatedResidual, LayerPruner

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
    seen, state_sizes, changes = [], [], []
    networks = [model] if averaged is None else [model, averaged.module]
    parameters = [
        (at, name, weakref.ref(parameter))
        for at, network in enumerate(networks)
        for name, parameter in network.named_parameters()
    ]
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
    # What left is gone, with its moments and its average.
    held = [set(dict(network.named_parameters())) for network in networks]
    left = [known for at, name, known in parameters if name not in held[at]]
    assert left and not any(known() is not None for known in left)
    assert len(optimizer.state) == len(held[0])
    # A number more a step, of whatever kind, would take two bytes at the least.
    early = state_sizes[WINDOW // 40 : 2 * WINDOW // 40]
    assert max(state_sizes) - max(early) < 1500
    assert len(pruner.events) <= 8 * len(pruner.sections)
