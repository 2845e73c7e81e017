"""What a result was measured on, and how memory is handed out meanwhile."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from layerprune import backends
from layerprune.training.outcome import versions
from layerprune.training.records import write_atomic


def facts(device: str | None = None) -> dict:
    """Versions, device, threads, commit, what runs the operations, and of a GPU its driver."""
    result = {
        "versions": versions(),
        "operations": {kind: str(backend) for kind, backend in backends().items()},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
    if torch.cuda.is_available() and device != "cpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result["driver"] = (_output(query) or "").partition("\n")[0] or None
        result["versions"]["triton"] = importlib.metadata.version("triton")
        result["versions"]["cuda"] = torch.version.cuda
    return result


def commit() -> str | None:
    """The tree's commit, marked where the tree differs from it.

    Of a tree that came without its history, LAYERPRUNE_COMMIT tells.
    """
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    return _output(command) or os.environ.get("LAYERPRUNE_COMMIT")


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it fails or is not there."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def device_name(device: str | None) -> str:
    """The GPU's or the processor's model."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def slug(name: str) -> str:
    """A device's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_folder() -> Path:
    """Where the results of this machine's GPU belong."""
    return Path(__file__).resolve().parent / "results" / slug(torch.cuda.get_device_name())


def write_result(path: Path, result: object) -> None:
    """Writes a result as JSON, or leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result, indent=2) + "\n")


MEMORY = ("fresh", "reused")
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _MMAP_MAX = -3, -1, -4


def hand_out_memory(kind: str) -> None:
    """Fixes what glibc otherwise decides by what was freed before: no timing averages that away.

    "fresh": every large tensor is new memory from the system, with a page fault for every page.
    "reused": large tensors come from memory that was in use before.

    Raises:
        RuntimeError: The C library cannot be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = {
        "fresh": ((_MMAP_MAX, 1 << 20), (_MMAP_THRESHOLD, 1 << 20)),
        "reused": ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, (1 << 31) - 1)),
    }[kind]
    if mallopt is None or not all(mallopt(key, value) for key, value in settings):
        raise RuntimeError("the C library's memory cannot be fixed: pass --memory as-is")
