"""What a profile of a GPU says: launches, their time, and calls that make the host wait."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "measured"
CALL = re.compile(r"cu(da)?(\w+Synchronize|Memcpy(?!\w*Async)\w*)(_v\d+)?")
"""Calls of the CUDA runtime and driver that wait."""
COPY = re.compile(r"Memcpy .*Pageable.*")
"""Copies from and to memory that is not pinned: called asynchronous, they wait all the same."""
POLL = re.compile(r"cudaEventQuery(_v\d+)?")
"""Asks whether earlier work is done; whoever asks again and again waits for it, and only for it."""
DEVICE_KINDS = {"kernel": "kernels", "gpu_memset": "memsets", "gpu_memcpy": "copies"}


def traced(function: Callable[[], object], calls: int) -> list[dict]:
    """The events of so many calls, as in a Chrome trace; on a machine without a GPU the host's.

    The calls are in a range of their own, so that the wait at its end is not counted with theirs.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(MEASURED):
            for _ in range(calls):
                function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def launches(events: list[dict], calls: int) -> dict[str, float]:
    """What each call ran on the device, and for how long."""
    found: dict[str, float] = {"device_us": 0.0}
    for category, name in DEVICE_KINDS.items():
        durations = [event["dur"] for event in events if event.get("cat") == category]
        found |= {name: len(durations) / calls, f"{name}_us": sum(durations) / calls}
        found["device_us"] += found[f"{name}_us"]
    return found


def synchronisations(events: list[dict], calls: int) -> dict[str, float]:
    """How often each call made the host wait for all that was queued, by what it called."""
    waits = [event["name"] for event in _on_the_host(events) if CALL.fullmatch(event["name"])]
    waits += [
        event["name"]
        for event in events
        if event.get("cat") == "gpu_memcpy" and COPY.fullmatch(event["name"])
    ]
    return {name: count / calls for name, count in Counter(waits).items()}


def polls(events: list[dict], calls: int) -> float:
    """How often each call asked whether earlier work was done."""
    return sum(bool(POLL.fullmatch(event["name"])) for event in _on_the_host(events)) / calls


def _on_the_host(events: list[dict]) -> list[dict]:
    """Calls of CUDA within the range of the calls."""
    ranges = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event.get("name") == MEASURED
    ]
    return [
        event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and any(start <= event["ts"] < end for start, end in ranges)
    ]
