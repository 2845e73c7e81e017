"""The operations run on the current stream of their tensors' device, and share nothing."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

HOLD = 100_000_000
"""Clock cycles that a stream is held up: some 50 ms, in which the other work would be done."""


def test_a_side_stream(every):
    """What is written to the arguments on a stream, late, is seen by what follows there."""
    old, new = every.values(1), every.values(2)
    expected = every.run(new)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(HOLD)
        for name, tensor in vars(old).items():
            tensor.copy_(getattr(new, name))
        found = every.run(old)
    torch.cuda.current_stream().wait_stream(side)
    assert every.equal(found, expected)


def test_results_wait_for_the_stream_alone(every):
    """Work of another stream that waits for an event reads finished results."""
    v = every.values(1)
    expected = every.run(v)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(HOLD)
        found = every.run(v)
        done = first.record_event()
    with torch.cuda.stream(second):
        second.wait_event(done)
        copies = [t.clone() for t in found]
    torch.cuda.synchronize()
    assert every.equal(copies, expected)


def test_two_streams_at_a_time(every):
    """Different data side by side: no scratch memory is shared."""
    data = [every.values(1), every.values(2)]
    expected = [every.run(v) for v in data]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in data]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(HOLD)
    found = [[], []]
    for _ in range(20):
        for stream, v, results in zip(streams, data, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(every.run(v))
    torch.cuda.synchronize()
    for results, want in zip(found, expected, strict=True):
        assert all(every.equal(result, want) for result in results)


def test_two_runs_learn_at_a_time(every):
    """Thirty steps on the states of two runs, each on its own stream."""

    def learnt(v):
        return [v.theta, v.statistics, v.in_play]

    def copies():
        return [every.values(1), every.values(2)]

    expected, found = copies(), copies()
    for v in expected:
        for _ in range(30):
            every.learn_(v)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in found]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(HOLD)
    for _ in range(30):
        for stream, v in zip(streams, found, strict=True):
            with torch.cuda.stream(stream):
                every.learn_(v)
    torch.cuda.synchronize()
    for v, want in zip(found, expected, strict=True):
        assert every.equal(learnt(v), learnt(want))
        assert not torch.equal(v.theta, torch.full_like(v.theta, 0.5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_is_current(every):
    """The tensors' device and its current stream count, not the current device."""
    old, new = every.values(1, "cuda:1"), every.values(2, "cuda:1")
    with torch.cuda.device(1):
        expected = every.run(new)
    torch.cuda.synchronize(1)
    side = torch.cuda.Stream(device=1)
    with torch.cuda.stream(side), torch.cuda.device(0):
        with torch.cuda.device(1):
            torch.cuda._sleep(HOLD)
        for name, tensor in vars(old).items():
            tensor.copy_(getattr(new, name))
        found = every.run(old)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert every.equal(found, expected)
