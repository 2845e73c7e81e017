"""Mixed precision, accumulation, clipping and their combinations: what theta learns stays true."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, LayerPruner, PruneConfig

WIDTH, CLASSES, ROWS = 8, 3, 32


def _model():
    torch.manual_seed(0)
    sections = [
        GatedResidual(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)))
        for _ in range(4)
    ]
    return nn.Sequential(nn.Linear(5, WIDTH), *sections, nn.Linear(WIDTH, CLASSES))


def _pruner(model, total_steps=1000, strength=0.1, **config):
    settings = PruneConfig(warm_up=0.0, warm_up_limit=0.0, max_descending=None, **config)
    # In the model's own precision, whichever it is.
    example = torch.zeros(2, 5, dtype=model[0].weight.dtype)
    return LayerPruner(
        model,
        example_inputs=example,
        total_steps=total_steps,
        strength=strength,
        config=settings,
    )


def _batch(number, rows=ROWS):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(rows, 5, generator=generator)
    return x, torch.randint(0, CLASSES, (rows,), generator=generator)


def _gates(pruner):
    """float64 ``[L, B]``: the gates of the last forward, where each section has a value a row."""
    return torch.stack([gate.draw.gate.detach().double() for gate in pruner._run.bank.gates])


def _slopes(model, gates, x, y):
    """What evidence is by definition: derivatives of each row's own loss, in double precision."""
    model = copy.deepcopy(model).double()
    gates = gates.clone().requires_grad_()
    out = model[0](x.double())
    for gate, section in zip(gates, model[1:-1], strict=True):
        out = out + gate[:, None] * section.branch(out)
    F.cross_entropy(model[-1](out), y, reduction="sum").backward()
    return gates.grad


# One whole batch


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulated_evidence_is_that_of_one_whole_batch(parts):
    """Micro-batches of different draws, against one backward through all rows with their gates."""
    model = _model()
    pruner = _pruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = []
    for number in range(2):
        x, y = _batch(number)
        gates = []
        for micro_x, micro_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(micro_x), micro_y) / parts).backward()
            gates.append(_gates(pruner))
        expected = _slopes(model, torch.cat(gates, 1), x, y)
        optimizer.step()
        pruner.step(optimizer, accumulation=parts)
        optimizer.zero_grad()
        found = pruner.state_dict()["evidence"][-1]
        counted = found["counted"]
        assert counted.shape == (4, ROWS) and counted.any(1).all() and not counted.all(1).any()
        torch.testing.assert_close(
            found["slope"][counted].double(), expected[counted], rtol=1e-4, atol=1e-6
        )
        said.append((expected.float() * counted, counted))
    # One theta step for the first of the two, whatever it came in.
    once = _pruner(_model())
    once._run.step_count, once._run.learning_since = 1, 0
    once._learner.move(*said[0])
    assert not once._run.bank.theta.equal(torch.full((4,), 0.5))
    torch.testing.assert_close(pruner._run.bank.theta, once._run.bank.theta, rtol=0, atol=1e-5)


# Precision


@pytest.mark.parametrize(
    "precision, scale, tolerance",
    [
        ("bfloat16 autocast", None, 0.05),
        ("bfloat16 weights", None, 0.05),
        ("float16 autocast", 2.0**12, 0.01),
        ("float16 autocast", 2.0**7, 0.01),
    ],
)
def test_evidence_in_low_precision(precision, scale, tolerance):
    """Float32, unscaled, and right but for the rounding of the forward and the backward."""
    dtype = torch.bfloat16 if "bfloat16" in precision else torch.float16
    model = _model()
    if "weights" in precision:
        model.to(dtype)
    pruner = _pruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    x, y = _batch(0)
    with torch.autocast("cpu", dtype) if "autocast" in precision else nullcontext():
        logits = model(x if "autocast" in precision else x.to(dtype))
    assert logits.dtype == dtype
    scaler.scale(F.cross_entropy(logits.float(), y)).backward()
    expected = _slopes(model, _gates(pruner), x, y)
    scaler.step(optimizer)
    pruner.step(optimizer, scaler)
    scaler.update()
    (found,) = pruner.state_dict()["evidence"]
    counted, slope = found["counted"], found["slope"]
    assert slope.dtype == torch.float32 and counted.any()
    assert not found["skipped"]
    error = (slope[counted].double() - expected[counted]).abs().max()
    assert error < tolerance * expected[counted].abs().max()


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, None), (torch.float16, 2.0**10)])
def test_a_measurement_in_low_precision(dtype, scale):
    """A decision test's difference against the one in float32, on the same rows and draws."""
    means = []
    for low in (False, True):
        model = _model()
        pruner = _pruner(model)
        run, optimizer = pruner._run, torch.optim.SGD(model.parameters(), lr=0.1)
        run.learning_since, run.judge.current = 0, 1
        enabled = low and scale is not None
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=enabled)
        x, y = _batch(0, 128)
        with torch.autocast("cpu", dtype, enabled=low):
            logits = model(x)
        scaler.scale(F.cross_entropy(logits.float(), y)).backward()
        scaler.step(optimizer)
        pruner.step(optimizer, scaler)
        (found,) = pruner.state_dict()["evidence"]
        assert found["section"] == 1 and found["measurement"]["rows"] == 128
        means.append(found["measurement"]["mean"])
    assert means[0] != means[1]
    assert means[1] == pytest.approx(means[0], rel=0.1)


def test_float16_overflows_until_the_scale_fits():
    """Real overflows of half precision: while steps are skipped, nothing moves."""
    model = _model()
    pruner = _pruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=10**9)
    skipped, thetas = [], []
    for number in range(16):
        x, y = _batch(number)
        held = copy.deepcopy(model.state_dict())
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
        scaler.scale(F.cross_entropy(logits.float(), y)).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        pruner.step(optimizer, scaler)
        scaler.update()
        optimizer.zero_grad()
        skipped.append(scaler.get_scale() < scale)
        assert skipped[-1] == all(held[k].equal(v) for k, v in model.state_dict().items())
        thetas.append(pruner._run.bank.theta.clone())
    assert skipped[:3] == [True] * 3 and 4 <= skipped.count(False)
    for number, left_out in enumerate(skipped[:-1]):  # the step after it would learn from it
        assert not left_out or thetas[number + 1].equal(thetas[number])
    assert not thetas[-1].equal(thetas[0]) and thetas[-1].isfinite().all()


# All at once


def _trace(*, scale=None, parts=1, clip=None, lr=0.125, overflow=(), steps=24, **options):
    """Thetas and weights of a run of two micro-batches a step."""
    model = _model()
    pruner = _pruner(model, total_steps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-3, **options)
    scaler = None
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**9)
    trace = []
    for number in range(steps):
        for half in range(2):
            x, y = _batch(2 * number + half)
            loss = F.cross_entropy(model(x), y) / parts
            if scaler is not None:
                loss = scaler.scale(loss)
            (loss * torch.inf if (number, half) in overflow else loss).backward()
        if scaler is not None and clip is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        pruner.step(optimizer, scaler, accumulation=parts)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        trace.append((pruner._run.bank.theta.clone(), weights))
    assert not trace[0][0].equal(trace[-1][0])
    return trace


def _same(left, right, theta_only=False):
    return all(
        a[0].equal(b[0]) and (theta_only or a[1].equal(b[1]))
        for a, b in zip(left, right, strict=True)
    )


def test_clipping_leaves_evidence_alone():
    """Gates are no parameters: theta is that of a run that is not clipped."""
    clipped, free = _trace(clip=1e-3, lr=0.0), _trace(lr=0.0)
    assert _same(clipped, free, theta_only=True)
    assert not _same(_trace(clip=1e-3), _trace())


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_accumulation_and_clipping_together(fused):
    """Powers of two are exact: weights and theta are those without a scaler, bit for bit."""
    plain = _trace(parts=2, clip=0.05, fused=fused)
    assert _same(plain, _trace(parts=2, clip=0.05, scale=1024.0, fused=fused))
    assert not _same(plain, _trace(parts=2, fused=fused))


def test_a_fused_optimizer_unscales_by_itself():
    """Inside its own step, which is skipped there too."""
    overflow = {(number, number % 2) for number in range(4, 24, 5)}
    apart, fused = (
        _trace(parts=2, scale=1024.0, fused=fused, overflow=overflow, lr=0.0)
        for fused in (False, True)
    )
    assert _same(apart, fused)
    for number, _ in overflow:  # the step after it would learn from it
        if number + 1 < len(fused):
            assert fused[number + 1][0].equal(fused[number][0])
    assert _same(_trace(parts=2, scale=1024.0, fused=True), _trace(parts=2, fused=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_run_with_everything(dtype):
    """Autocast, scaler, accumulation, clipping, a scheduler: sections leave, the rest trains on."""
    model = _model()
    pruner = _pruner(model, total_steps=40, strength=1000.0)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=41)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**10, growth_interval=5, enabled=dtype == torch.float16
    )
    x, y = _batch(0)
    losses = []
    for _ in range(40):
        for micro_x, micro_y in zip(x.chunk(2), y.chunk(2), strict=True):
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(micro_x), micro_y)
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        pruner.step(optimizer, scaler, accumulation=2)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    assert pruner.structure()["eliminated"] == ["1", "2", "3", "4"]
    assert len(optimizer.state) == len(list(model.parameters())) == 4
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "5.weight", "5.bias"]
    assert all(p.dtype == torch.float32 for p in pruner.strip().parameters())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("by", ["an updated scaler", "the loop"])
def test_a_step_that_was_left_out(by):
    """Told by `skipped`: it is no evidence, finite or not, and counts all the same."""
    model = _model()
    pruner = _pruner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=by == "an updated scaler")
    thetas = []
    for number in range(6):
        x, y = _batch(number)
        left_out = number == 3
        loss = scaler.scale(F.cross_entropy(model(x), y))
        (loss * torch.inf if left_out else loss).backward()
        if by == "an updated scaler":
            scaler.step(optimizer)
            if left_out:
                scaler.update()
        elif not left_out:
            optimizer.step()
        report = pruner.step(optimizer, scaler, skipped=left_out)
        if not left_out:
            scaler.update()
        optimizer.zero_grad()
        assert report.step == number + 1
        thetas.append(pruner._run.bank.theta.clone())
    moved = [not a.equal(b) for a, b in zip(thetas, thetas[1:], strict=False)]
    assert moved == [True, True, True, False, True]
