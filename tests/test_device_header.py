"""The header of gate mathematics is device code too: nvcc compiles it, where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNEL = """
#include "gate_math.h"

using namespace layerprune;

__global__ void draw_row(Stream stream, float theta, float rate, float* gates, int64_t* counts) {
  const Words words = row_words(stream, blockIdx.x, threadIdx.x);
  const Words reserved = row_words(stream, blockIdx.x, kReservedRow);
  const SystematicCounts c = systematic_counts(theta, rate, blockDim.x, reserved, 1, 8);
  counts[threadIdx.x] = c.running + row_of_key(rank_key(words.word[0], threadIdx.x));
  const float probe = stratified_probe(threadIdx.x, c.probes, words.word[2]);
  gates[threadIdx.x] = independent_probe(rate, words.word[1]) ? probe
                       : independent_gate(theta, words.word[3]);
}

__global__ void step(Statistics* statistics, float* theta, float penalty, StepOptions options) {
  const Statistics now = with_evidence(statistics[threadIdx.x], 0.5f, 8.0f, options.decay);
  statistics[threadIdx.x] = now;
  if (excess_bound(now, penalty, options.confidence) < 0.0f || excess(now, penalty) > 0.0f) {
    theta[threadIdx.x] = projected_theta(theta[threadIdx.x], 0.5f, penalty, row_variance(now),
                                         options);
  }
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiles_for_the_device(tmp_path: Path) -> None:
    """Every function in a kernel, without a warning."""
    source = tmp_path / "kernels.cu"
    source.write_text(KERNEL)
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-Werror=all-warnings", f"-I{CSRC}", "-ptx"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.ptx"), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernels.ptx").read_text().count(".visible .entry") == 2
