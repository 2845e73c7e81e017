"""What is for a GPU says so on a machine without one, and goes on where something fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


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
