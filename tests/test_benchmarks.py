"""How a GPU is measured, as far as a CPU can tell: its cases, its traces, its training steps."""

import device_operations
import device_trace
import machine
import operation_cases
import pytest
import torch
import training_step
from device_cases import cases
from device_stream import Shape, Stream

from layerprune.models.resnet import resnet


def clock(function) -> list[float]:
    """Calls the function as often as a clock would, more than once."""
    function()
    function()
    return [0.01, 0.009, 0.011]


def test_a_folder_is_named_after_the_device():
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_trace_tells_launches_and_waits():
    def event(cat: str, name: str, ts: float, dur: float = 1.0) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", device_trace.MEASURED, 100, 50),
        event("gpu_user_annotation", device_trace.MEASURED, 110, 60),
        event("kernel", "step_kernel", 120, 6),
        event("kernel", "step_kernel", 170, 8),
        event("gpu_memset", "Memset (Device)", 118, 2),
        event("cuda_runtime", "cudaLaunchKernel", 101),
        event("cuda_runtime", "cudaStreamSynchronize", 102),
        event("cuda_runtime", "cudaMemcpyAsync", 103),
        event("cuda_runtime", "cudaMemcpy", 104),
        event("cuda_driver", "cuStreamSynchronize", 105),
        event("cuda_runtime", "cudaEventQuery", 106),
        event("cuda_runtime", "cudaDeviceSynchronize", 151),  # the profiler's own
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 130, 0),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 131, 0),
    ]
    assert device_trace.launches(events, 2) == {
        "device_us": 8.0,
        "kernels": 1.0,
        "kernels_us": 7.0,
        "memsets": 0.5,
        "memsets_us": 1.0,
        "copies": 1.0,
        "copies_us": 0.0,
    }
    waits = device_trace.synchronisations(events, 2)
    assert waits == {
        "cudaStreamSynchronize": 0.5,
        "cudaMemcpy": 0.5,
        "cuStreamSynchronize": 0.5,
        "Memcpy HtoD (Pageable -> Device)": 0.5,
    }
    assert device_trace.polls(events, 2) == 0.5


def test_a_real_trace_has_the_range_of_the_calls():
    names = []
    events = device_trace.traced(lambda: names.append(torch.ones(3).sum()), 2)
    assert len(names) == 2
    (measured,) = [event for event in events if event.get("name") == device_trace.MEASURED]
    assert measured["cat"] == "user_annotation" and measured["dur"] > 0
    assert device_trace.synchronisations(events, 2) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        Shape((32, 8, 14, 14), torch.channels_last, "relu"),
        Shape((32, 17, 24), torch.contiguous_format, None),
    ],
    ids=["relu", "linear"],
)
def test_cases_agree_with_their_baselines(monkeypatch, shape, dtype):
    monkeypatch.setattr(device_operations, "peak_bytes", lambda function: function() and 0)
    stream = Stream("small", shape, dtype, "cpu", compiling=False)
    for case in cases(stream, [1, 0.5]):
        measured = device_operations.measure(case, clock)
        assert measured["times"].keys() >= {"ours", "eager", "copy"}
        assert device_operations.line({"family": "compiled", **measured})
        mask = stream.x.numel() // 8 if shape.activation else 0
        if case.name == "gated_residual" and case.labels["share"] == 1:
            whole = stream.batch * stream.row_bytes
            assert case.moved == {
                "forward": 3 * whole + mask,
                "backward": (4 if shape.activation else 3) * whole + mask,
            }


def test_a_wrong_result_is_not_timed():
    shape = Shape((16, 8), torch.contiguous_format, "relu")
    stream = Stream("small", shape, torch.float32, "cpu", compiling=False)
    stream.dense["eager"] = lambda x, branch, gate: torch.relu(x + 2 * gate * branch)
    with pytest.raises(AssertionError, match="y of eager"):
        device_operations.measure(next(iter(cases(stream, [0.5]))), clock)


def test_the_draw_and_the_step_are_profiled():
    for case in operation_cases.gate_cases("cpu"):
        measured = device_operations.measure_small(case, clock)
        assert measured["launches"]["kernels"] == 0  # there is no device
        assert device_operations.line(measured)


def test_a_training_step_with_every_kind_of_sections():
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    counts = {}
    for kind, theta in training_step.THETAS.items():
        run = training_step.Run(theta, images, labels, resnet(8))
        run.step()
        run.step()
        counts[kind] = sum(p.numel() for p in run.model.parameters())
        if run.pruner is not None:
            assert {section.theta for section in run.pruner.sections} == {theta}
    assert counts["open"] == counts["half"] == counts["plain"] > counts["removed"]
