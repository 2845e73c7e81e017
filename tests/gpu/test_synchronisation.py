"""In a training step the host never waits for what it has queued in that step.

It asks whether the step before is done, whose evidence it needs: the device has this one to do
then.
"""

import pytest
import torch
from device_trace import synchronisations, traced

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

STEPS = 24


def waits(function):
    """What made the host wait in a call of the function, by name."""
    torch.cuda.synchronize()
    return synchronisations(traced(function, 1), 1)


def test_waiting_is_noticed():
    """Reading a value, and copies from pageable memory; launching a kernel is none of it."""
    x, host = torch.ones(4, device="cuda"), torch.ones(4)
    x.sum().item()
    assert waits(lambda: x.sum().item())
    assert waits(lambda: host.to("cuda"))
    assert not waits(lambda: x.add_(1))


def steps(run):
    """Some steps of learning, in which theta moves and a section is measured."""
    tests, before = run.pruner.ledger.test_flops, run.step()
    for _ in range(STEPS):
        theta = run.step()
    assert run.pruner.phase == "learning"
    assert theta != before and run.pruner.ledger.test_flops > tests


@pytest.fixture
def learning(training):
    """A training in its learning phase, after another one has warmed up all that it needs."""
    steps(training())
    run = training()
    run.step()
    return run


def test_no_call_waits(learning):
    """By the profiler's account of what was called."""
    assert not waits(lambda: steps(learning))


def test_no_operation_waits(learning):
    """By torch, which raises at the place."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(learning)
    finally:
        torch.cuda.set_sync_debug_mode("default")
