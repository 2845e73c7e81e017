"""The operations inside what else a training step has: autocast, compilation, recomputation."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.checkpoint import checkpoint

from layerprune import GatedResidual, ops
from layerprune.gate import SectionDraw
from layerprune.ops.functional import MASKED_DEVICES
from layerprune.sections.residual import GATE_ATTRIBUTE

BATCH = 32


class Section:
    """A gated section in training mode, whose gates are drawn from outside."""

    def __init__(self, branch, activation="relu"):
        torch.manual_seed(0)
        self.module = GatedResidual(branch, None, activation)
        self.gate = getattr(self.module, GATE_ATTRIBUTE)
        self.number = 0

    def draw(self, theta):
        """Draws for one batch, an eighth of its rows as probes; the number of rows that run."""
        state = torch.tensor([3, self.number, 0])
        drawn = ops.sample_gates(
            torch.tensor([theta]), BATCH, state, torch.tensor([0.125]), min_rows=2
        )
        self.number += 1
        running, probed = drawn.counts[0].tolist()
        self.gate.draw = SectionDraw(
            drawn.gates[0].requires_grad_(),
            drawn.slots[0],
            drawn.rows[0, :running],
            drawn.probes[0, :probed],
        )
        return running

    def differentiate(self, function, x):
        """Output and the gradients of input, gates and parameters."""
        x = x.detach().requires_grad_()
        gate = self.gate.draw.gate
        gate.grad = None
        self.module.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, gate.grad, *(p.grad for p in self.module.parameters())]


@pytest.mark.parametrize(("backend", "steps"), [("aot_eager", 200), ("inductor", 20)])
@torch._inductor.config.patch(fx_graph_cache=False)
@torch._functorch.config.patch(enable_autograd_cache=False)
def test_compiles_at_most_twice(backend, steps):
    """Changing numbers of rows, all of them included: one static and one dynamic compilation.

    Without a fallback to eager. Every step equals the eager section under the same draw: exactly
    where the compiler leaves the arithmetic as it is. Without Inductor's cache of graphs on disk,
    which hands code for AVX to a run under ATEN_CPU_CAPABILITY=default; there it does not compile.
    """
    if backend == "inductor":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            pytest.skip("Inductor has no C++ compiler here")
    torch._dynamo.reset()
    section = Section(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(section.module, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    counts = set()
    for _ in range(steps):
        theta = float(torch.rand((), generator=generator) * 1.2 - 0.1)
        counts.add(section.draw(min(max(theta, 0.0), 1.0)))
        x = torch.randn(BATCH, 6, generator=generator)
        expected = section.differentiate(section.module, x)
        for found, want in zip(section.differentiate(compiled, x), expected, strict=True):
            if backend == "aot_eager":
                assert torch.equal(found, want)
            else:
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert len(counts) > steps / 20 and BATCH in counts
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_section(reentrant):
    """Recomputing the section in backward changes nothing: the draw is not repeated."""
    section = Section(nn.Linear(6, 6))
    section.draw(0.4)
    x = torch.randn(BATCH, 6)

    def recomputed(x):
        return checkpoint(section.module, x, use_reentrant=reentrant)

    expected = section.differentiate(section.module, x)
    for found, want in zip(section.differentiate(recomputed, x), expected, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_stochastic_depth(reentrant):
    """The gates are drawn again from the counter, not from torch's generator."""
    state, theta = torch.tensor([1, 2, 3]), torch.tensor(0.5)
    weight = torch.randn(4, 4, requires_grad=True)

    def block(x):
        return ops.sampled_gated_residual(x, x @ weight, theta, state, 0, "relu")[0]

    results = []
    for function in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        x = torch.ones(16, 4, requires_grad=True)
        weight.grad = None
        y = function(x)
        y.square().sum().backward()
        results.append([y, x.grad, weight.grad])
    for found, want in zip(*results, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("whole", [False, True])
def test_autocast(whole, device):
    """A bfloat16 branch beside a float32 stream: float32 gates, each gradient in its own dtype."""
    section = Section(nn.Linear(6, 6))
    section.draw(1.0 if whole else 0.4)
    gate = section.gate.draw.gate
    x = torch.randn(BATCH, 6)
    seen = []
    section.module.branch.register_forward_hook(lambda *a: seen.append(a[2].dtype))

    def mixed(x):
        with torch.autocast(device.type, torch.bfloat16):
            return section.module(x)

    y, d_x, d_gate, *d_parameters = section.differentiate(mixed, x)
    assert seen == [torch.bfloat16]
    assert gate.dtype == d_gate.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in (y, d_x, *d_parameters))
    expected = section.differentiate(section.module, x)
    for found, want in zip((y, d_x, d_gate, *d_parameters), expected, strict=True):
        # Two roundings to 8 bits, relative to the largest value.
        assert (found - want).abs().max() <= 2**-6 * want.abs().max()


def test_autocast_leaves_gates_and_theta_alone(device):
    """Neither is cast on the way into an operator; a half-precision gate is refused."""
    x, branch = torch.randn(4, 3), torch.randn(4, 3).bfloat16()
    gate, theta = torch.tensor([0.1, 1.0, 0.0, 0.3]), torch.tensor([0.3, 0.1])
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.gated_residual(x, branch, gate)
        drawn = ops.sample_gates(theta, 64, torch.tensor([1, 2, 3]), theta)
        assert ops.gated_residual(x.bfloat16(), branch, gate).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="gate must be torch.float32"):
            ops.gated_residual(x, branch, gate.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x + gate[:, None] * branch.float())
    outside = ops.sample_gates(theta, 64, torch.tensor([1, 2, 3]), theta)
    assert torch.equal(drawn.gates, outside.gates) and drawn.gates.dtype == torch.float32


def test_what_a_section_saves(device):
    """Half of the rows, one eighth of them probes: y, or a bit for each of it; the probe rows."""
    rows = torch.arange(0, 32, 2)
    probes = rows[::8].contiguous()
    slot = torch.full((32,), -1, dtype=torch.int32)
    slot[rows] = torch.arange(16, dtype=torch.int32)
    gate = (slot >= 0).float()
    gate[probes] = 0.5
    gate.requires_grad_()
    x = torch.randn(32, 1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        taken, rest = ops.take_rows(x, rows, exclusive=True)
        y = ops.gated_residual(rest, taken, gate, slot, "relu", gate_grad_rows=probes)
    large = sorted(t.shape for t in saved if t.numel() >= 1000)
    if device.type in MASKED_DEVICES:
        assert large == [(2, 1000), (32, 1000 // 8)]
    else:
        assert large == [(2, 1000), (32, 1000)]
        assert any(t.data_ptr() == y.data_ptr() for t in saved)
    assert sum(t.numel() for t in saved if t.numel() < 1000) <= 3 * 32
