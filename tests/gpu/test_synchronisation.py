"""In a training step the host never waits for the device."""

import re

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

STEPS = 24

CALL = re.compile(r"cu(da)?(\w+Synchronize|Memcpy(?!\w*Async)\w*)(_v\d+)?")
"""Calls of the CUDA runtime and driver that wait."""

COPY = re.compile(r"Memcpy .*Pageable")
"""Copies from and to memory that is not pinned: called asynchronous, they wait all the same."""


def waits(function):
    """What made the host wait in a call of the function, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("observed"):
            function()
        torch.cuda.synchronize()
    events = profiler.events()
    (span,) = (
        event.time_range
        for event in events
        if event.name == "observed" and event.device_type == DeviceType.CPU
    )
    calls = [
        event.name
        for event in events
        if CALL.fullmatch(event.name) and span.start <= event.time_range.start <= span.end
    ]
    return calls + [event.name for event in events if COPY.match(event.name)]


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
