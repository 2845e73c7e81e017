"""Pruning under ``torch.compile``: the run of the plain model, and few compilations."""

import copy
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from layerprune import LayerPruner, find_sections
from layerprune.models import build

ROWS, STEPS = 48, 30


class SmallBlock(nn.Module):
    """A residual block that only its shapes show to be one."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x):
        return x + self.inner(x)


class Stack(nn.Module):
    """Opaque blocks, called one by one."""

    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def convolutional():
    return build("resnet20", width=4, image_size=8, in_channels=1), torch.randn(ROWS, 1, 8, 8)


def torchvision_blocks():
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [2, 2, 1, 1], 3), torch.randn(ROWS, 3, 8, 8)


def opaque(blocks=5):
    return Stack([SmallBlock(16) for _ in range(blocks)]), torch.randn(ROWS, 5, 6)


def two_blocks():
    return opaque(2)


class TwoBranches(nn.Module):
    """Attention and an MLP, which are sections by themselves."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer = nn.MultiheadAttention(width, 2, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, x):
        y = self.norm1(x)
        y, _ = self.mixer(y, y, y, need_weights=False)
        x = x + y
        return x + self.inner(self.norm2(x))


def transformer():
    layers = [nn.TransformerEncoderLayer(16, 2, 16, 0.1, batch_first=True) for _ in range(4)]
    return Stack(layers), torch.randn(ROWS, 5, 6)


def pruner_of(model, x):
    return LayerPruner(model, example_inputs=x, total_steps=STEPS, strength=0.5, seed=4)


def train(model, call, pruner, x):
    """Losses, and after each step what was compiled in it: names of code, how often."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    target = torch.arange(ROWS) % 3
    losses, compiled, reports = [], [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        clear_compilation_metrics()
        loss = nn.functional.cross_entropy(call(x), target)
        loss.backward()
        optimizer.step()
        reports.append(pruner.step(optimizer))
        optimizer.zero_grad()
        losses.append(loss.detach())
        names = (metrics.co_name for metrics in get_compilation_metrics())
        compiled.append(Counter(name for name in names if name))
    return torch.stack(losses), compiled, reports


def check_compilations(compiled, reports):
    """No section has a part of a graph, nor more than two compilations between eliminations."""
    assert not [name for step in compiled for name in step if "resume_in_section" in name]
    found = Counter()
    for step, report in zip(compiled, reports, strict=True):
        found += Counter({k: n for k, n in step.items() if k.startswith("section ")})
        assert not found or max(found.values()) <= 2, found
        if report.changed:
            found.clear()
    reasons = [reason for reason in counters["graph_break"] if "is decided outside" not in reason]
    assert not [reason for reason in reasons if "section" in reason], reasons


def run_both(make, compile_model, backend, *, before=False, tolerance=0.0):
    """Trains a model plain and compiled; the two runs are one."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x = make()
    plain = copy.deepcopy(model)
    pruner = pruner_of(plain, x)
    expected, _, _ = train(plain, plain, pruner, x)
    events = [(event.step, event.section, event.decision) for event in pruner.events]
    eliminations = {event.step for event in pruner.events if event.decision == "eliminated"}
    assert len(eliminations) >= 2

    call = compile_model(model, backend) if before else None
    pruner = pruner_of(model, x)
    call = call or compile_model(model, backend)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        found, compiled, reports = train(model, call, pruner, x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert [(event.step, event.section, event.decision) for event in pruner.events] == events
    check_compilations(compiled, reports)
    sections = {name for step in compiled for name in step if name.startswith("section ")}
    assert len(sections) == len(pruner.sections)
    return model, call, pruner, x


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def section_by_section(model, backend):
    for section in find_sections(model, example_of(model)):
        section.module.compile(backend=backend, fullgraph=True)
    return model


def example_of(model):
    return torch.randn(2, 5, 6) if isinstance(model, Stack) else torch.randn(2, 1, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "compile_model", "before"),
    [
        (convolutional, in_place, False),
        (convolutional, section_by_section, True),
        (torchvision_blocks, in_place, True),
        (opaque, wrapped, False),
        (opaque, section_by_section, False),
        (transformer, in_place, True),
    ],
)
def test_a_compiled_run_is_the_plain_one(make, compile_model, before):
    run_both(make, compile_model, "aot_eager", before=before, tolerance=1e-5)


@pytest.mark.slow
def test_branches_inside_of_blocks():
    """Their modules are compiled, on any number of rows; what lies in between is not."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack([TwoBranches(16) for _ in range(4)])
    x, plain = torch.randn(ROWS, 5, 6), copy.deepcopy(model)
    runs = []
    for subject in (plain, model):
        pruner = pruner_of(subject, x)
        assert {info.kind for info in pruner.sections} == {"branch"}
        if subject is model:
            model.compile(backend="aot_eager")
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            losses, compiled, _ = train(subject, subject, pruner, x)
        events = [(event.step, event.section, event.decision) for event in pruner.events]
        runs.append((losses, events))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-5)
    assert runs[0][1] == runs[1][1] and len(runs[0][1]) >= 2
    counts = [sum(step.values()) for step in compiled]
    assert sum(counts[10:]) <= 2, counts


@pytest.mark.slow
def test_inductor():
    """One section, in one graph, on ever other rows; its kernels add up in another order."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = opaque(1)
    plain = copy.deepcopy(model)
    runs = []
    for subject in (plain, model):
        pruner = pruner_of(subject, x)
        clear_compilation_metrics()
        if subject is model:
            model.blocks[0].compile(fullgraph=True)
        rows = []
        for _ in range(4):
            subject(x).square().sum().backward()
            draw = pruner._run.bank.gates[0].draw
            rows.append(draw.rows.numel())
            pruner._run.bank.theta[0] -= 0.1
        runs.append([parameter.grad for parameter in subject.parameters()] + [draw.gate.grad])
    assert len(set(rows)) == 4
    for found, expected in zip(*reversed(runs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # torch also notes a backward that is compiled apart, once it is run, and work at run time.
    noted = get_compilation_metrics()
    graphs = [m.co_name for m in noted if m.is_forward is not False and not m.is_runtime]
    assert graphs == ["section blocks.0"]


def test_evaluation_and_a_smaller_last_batch():
    """One form for evaluation; a batch of another size costs one compilation, then any may come."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = two_blocks()
    pruner = pruner_of(model, x)
    model.compile(backend="eager")
    clear_compilation_metrics()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for rows in (ROWS, ROWS, 7, ROWS, 33, 5, 4, 3, 2):
            model.train()
            model(x[:rows]).sum().backward()
            model.eval()
            with torch.no_grad():
                found = model(x[:rows])
                expected = Stack.forward(model, x[:rows])
            torch.testing.assert_close(found, expected)
    names = Counter(metrics.co_name for metrics in get_compilation_metrics())
    assert {n for name, n in names.items() if name and name.startswith("section ")} == {4}
    model.train()
    stripped = copy.deepcopy(model.train())
    assert pruner.strip() is model
    torch.testing.assert_close(model(x), Stack.forward(stripped, x))


def test_what_torch_compile_returned_is_refused():
    model, x = two_blocks()
    with pytest.raises(TypeError, match=r"model\.compile\(\)"):
        pruner_of(torch.compile(model, backend="eager"), x)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    with pytest.raises(TypeError, match=r"model\.compile\(\)"):
        pruner_of(model, x)


def test_a_model_without_a_pruner_is_one_graph():
    """Before a pruner has come, in a copy, and after it has gone."""
    torch.manual_seed(0)
    model = build("resnet20", width=2, image_size=8, in_channels=1)
    x = torch.randn(ROWS, 1, 8, 8)
    for state in ("before", "copy", "after"):
        torch._dynamo.reset()
        if state != "before":
            pruner = pruner_of(model, x)
        subject = copy.deepcopy(model) if state == "copy" else model
        if state == "after":
            subject = pruner.strip()
        elif state == "copy":
            pruner.strip()
        expected = subject.eval()(x)
        compiled = torch.compile(subject, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
