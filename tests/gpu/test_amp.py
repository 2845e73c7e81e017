"""Automatic mixed precision: float32 gates, unscaled evidence, and steps that are skipped."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_gradients_under_autocast(dtype, training):
    """float32, and those of the float32 network but for roundings of a branch and its gradient."""
    exact, mixed = training(), training(dtype)
    exact.backward()
    mixed.backward()
    assert len(mixed.gates()) == len(exact.gates()) > 0
    for found, expected in zip(mixed.gates(), exact.gates(), strict=True):
        assert torch.equal(found, expected)
        assert found.dtype == found.grad.dtype == torch.float32
        # A dozen roundings to 8 bits (bfloat16), relative to the largest value.
        error = (found.grad - expected.grad).abs().max()
        assert error <= 0.1 * expected.grad.abs().max()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_scale_is_taken_out(dtype, training):
    """Theta under a gradient scaler moves as without one: a power of two rounds nothing."""
    plain = training(dtype)
    scaled = training(dtype, torch.amp.GradScaler("cuda", init_scale=2.0**8))
    for _ in range(12):
        expected, found = plain.step(), scaled.step()
        # In float16 the scale saves small gradients that are lost without it.
        assert found == pytest.approx(expected, abs=1e-5 if dtype is None else 0.02)
    assert any(theta != 0.5 for theta in expected)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_skipped_step_moves_nothing(dtype, training):
    """Nor do the gates' gradients of that step count later; then learning goes on."""
    run = training(dtype, torch.amp.GradScaler("cuda", init_scale=2.0**8))
    for _ in range(6):
        run.step()
    # What the last good step has found may be learnt in this one.
    held = run.step(spoil=torch.inf)
    parameters = run.parameters()
    for _ in range(3):
        assert run.step(spoil=torch.inf) == held
    assert all(map(torch.equal, run.parameters(), parameters))
    for _ in range(3):
        theta = run.step()
    assert theta != held and not all(map(torch.equal, run.parameters(), parameters))


def test_overflow_without_a_scaler_is_an_error(training):
    """Nobody would have skipped the step."""
    run = training(torch.bfloat16)
    with pytest.raises(FloatingPointError, match="not finite"):
        for _ in range(3):
            run.step(spoil=torch.inf)
