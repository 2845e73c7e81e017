"""The benchmarks' pure parts, and on the CPU what a GPU is to measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import device_operations
import device_trace
import figures
import machine
import operation_cases
import pytest
import tables
import torch
import training_step
from device_cases import cases
from device_stream import Shape, Stream

from layerprune.models.resnet import resnet

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"median_us": 10.0, "p20_us": 9.0, "p80_us": 11.0}


def clock(function) -> list[float]:
    """Calls the function as often as a clock would, more than once."""
    function()
    function()
    return [0.01, 0.009, 0.011]


def row(family: str, share: float, **microseconds: float) -> dict:
    """A gated residual's row, `both` of every kind as given."""
    return {
        "family": family,
        "operation": "gated_residual",
        "shape": "ViT-B",
        "dtype": "bfloat16",
        "share": share,
        "times": {
            kind: dict.fromkeys(("forward", "backward", "both"), TIMES | {"median_us": value})
            for kind, value in microseconds.items()
        },
        "of_copy": {"forward": 0.95, "backward": 0.85, "both": 0.9},
        "peak_bytes": dict.fromkeys(microseconds, 1 << 20),
    }


def step_row(kernels: float) -> dict:
    events = [{"cat": "kernel", "dur": 5.0}] * int(kernels) + [{"cat": "gpu_memset", "dur": 1.0}]
    return {
        "family": "compiled",
        "operation": "projected_gate_step_",
        "shape": "1,000 sections, 256 rows",
        "times": {"ours": {"both": TIMES}, "eager": {"both": TIMES}},
        "launches": device_trace.launches(events, 1),
    }


def met(found: list[dict]) -> dict[str, bool]:
    return {figure["name"]: figure["met"] for figure in found}


def test_figures_hold_the_rows_to_their_targets():
    rows = [
        row("compiled", 1, ours=10, eager=30, compile=12, **{"max-autotune": 10.5}),
        row("compiled", 0.5, ours=8, eager=30, compile=12),
        row("triton", 1, ours=12, eager=30),
        step_row(1),
    ]
    found = met(figures.operation_figures(rows))
    assert found == {
        "compiled, ViT-B: forward, bytes/s of a copy's, least of all shares": True,
        "compiled, ViT-B: backward, bytes/s of a copy's, least of all shares": False,
        # the faster mode counts: 10.5 / 10
        "compiled, ViT-B: times torch.compile, 100% of the rows": False,
        "compiled, ViT-B: times torch.compile, 50% of the rows": True,
        "compiled, projected_gate_step_: kernels": True,
        "compiled, projected_gate_step_: device time, us": True,
        "triton, ViT-B: forward, bytes/s of a copy's, least of all shares": True,
        "triton, ViT-B: backward, bytes/s of a copy's, least of all shares": False,
        "ViT-B: Triton's time over the compiled kernels', largest of all shares": False,
    }
    assert not met(figures.operation_figures([step_row(2)]))[
        "compiled, projected_gate_step_: kernels"
    ]


def test_figures_of_a_training_step():
    seconds = {"plain": 1.0, "open": 1.01, "half": 0.7, "removed": 0.2}
    rows = [{"sections": k, "median_s": s, "waits": {}} for k, s in seconds.items()]
    rows[1]["waits"] = {"cudaStreamSynchronize": 2.0}
    overhead, half, waits = figures.training_figures(rows)
    assert overhead["met"] and overhead["measured"] == pytest.approx(1.01)
    assert not half["met"] and half["measured"] == pytest.approx(0.7 / 0.6)
    assert not waits["met"] and waits["measured"] == 2


def test_both_families_get_the_baselines_that_were_measured_once():
    rows = [row("compiled", 1, ours=10, compile=12), row("triton", 1, ours=11)]
    rows.append(row("triton", 0.5, ours=11))
    device_operations.share_baselines(rows)
    assert rows[1]["times"]["compile"] == rows[0]["times"]["compile"]
    assert rows[1]["times"]["ours"]["both"]["median_us"] == 11
    assert "compile" not in rows[2]["times"]


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
        event("cuda_runtime", "cudaDeviceSynchronize", 151),  # the profiler's own
    ]
    assert device_trace.launches(events, 2) == {
        "device_us": 8.0,
        "kernels": 1.0,
        "kernels_us": 7.0,
        "memsets": 0.5,
        "memsets_us": 1.0,
        "copies": 0.0,
        "copies_us": 0.0,
    }
    waits = device_trace.synchronisations(events, 2)
    assert waits == {"cudaStreamSynchronize": 0.5, "cudaMemcpy": 0.5}


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
        mask = stream.batch * stream.row_bytes if shape.activation else 0
        if case.name == "gated_residual" and case.labels["share"] == 1:
            whole = stream.batch * stream.row_bytes
            assert case.moved == {"forward": 3 * whole, "backward": 4 * whole + mask}


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


def test_the_page_is_what_the_results_give():
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page, "run: python benchmarks/tables.py"


def test_a_gpu_gets_its_tables(tmp_path):
    assert "No GPU has run" in tables.section("gpu", tmp_path)
    facts = {
        "versions": {"layerprune": "0.1.0", "torch": "2.14", "driver": "580"},
        "device": "NVIDIA H100",
        "threads": 8,
        "commit": None,
    }
    rows = [row("triton", 1, ours=10, eager=30, compile=12, dinov2=20), step_row(1)]
    results = {
        "operations": facts | {"rows": rows, "figures": figures.operation_figures(rows)},
        "training-step": facts
        | {
            "batch_size": 256,
            "figures": [],
            "rows": [
                {
                    "sections": "plain",
                    "median_s": 0.1,
                    "device_s": 0.09,
                    "kernels": 900.0,
                    "waits": {"cudaMemcpy": 1.0},
                    "peak_bytes": 1 << 30,
                }
            ],
        },
    }
    folder = tmp_path / "nvidia-h100"
    folder.mkdir()
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    text = tables.section("gpu", tmp_path)
    assert "### NVIDIA H100\n" in text and "driver 580" in text and "`unknown`" in text
    assert (
        "| `gated_residual` | ViT-B | bfloat16 | 100% | triton | 10 | 95% | 10 | 85% | 3.00 | 1.20 "
        "| 2.00 | 1 | 1 |" in text
    )
    assert "| plain | 100.0 ms | 90.0 ms | 900 | 1 | 1,024 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "command",
    [[sys.executable, "benchmarks/operations.py", "--device", "cuda"], [".ci/gpu-check"]],
    ids=["operations", "gpu-check"],
)
def test_without_a_gpu_it_says_so(command):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode != 0 and b"there is no GPU that" in done.stderr


def test_gpu_check_goes_on_and_sums_up(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *tests/gpu) exit 1;; esac\necho "ran $*"\n')
    python.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": str(python),
        "PARTS": "tests benchmark",
        "RESULTS": "out",
    }
    done = subprocess.run(
        [".ci/gpu-check"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ran benchmarks/operations.py --device cuda --output out/operations.json" in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "failed: tests of the GPU, compiled",
        "failed: tests of the GPU, triton",
    ]
