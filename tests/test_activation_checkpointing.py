"""Activation checkpointing: what a backward recomputes is what its own forward computed."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from layerprune import GatedResidual, LayerPruner

ROWS, STEPS = 24, 30


class Branch(nn.Module):
    """A branch with dropout; ``reentrant`` checkpoints its inside."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8))
        self.reentrant = None

    def forward(self, x):
        return again(self.inside, x, self.reentrant)


class Block(nn.Module):
    """An opaque block."""

    def __init__(self):
        super().__init__()
        self.branch = Branch()

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Module):
    """A stack of sections of two kinds; ``where`` says what of it is checkpointed, and how."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        gated = [GatedResidual(Branch(), activation="relu") for _ in range(2)]
        self.blocks = nn.ModuleList([gated[0], Block(), gated[1], Block(), Block()])
        self.head = nn.Linear(8, 3)
        self.where, self.reentrant = None, None

    def stack(self, x):
        for block in self.blocks:
            x = again(block, x, self.reentrant if self.where in ("sections", "nested") else None)
        return x

    def forward(self, x):
        x = self.stem(x)
        whole = self.where in ("stack", "nested")
        return self.head(again(self.stack, x, self.reentrant if whole else None))


def again(function, x, reentrant):
    """The function, checkpointed unless ``reentrant`` is None."""
    return function(x) if reentrant is None else checkpoint(function, x, use_reentrant=reentrant)


def checkpointed(model, where, reentrant):
    """Makes a model checkpoint; returns what is to be called."""
    if where == "wrapper":
        impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda module: checkpoint_wrapper(module, impl),
            check_fn=lambda module: module in set(model.blocks),
        )
    elif where == "branch":
        for module in model.modules():
            if isinstance(module, Branch):
                module.reentrant = reentrant
    elif where == "model":
        return lambda x: checkpoint(model, x, use_reentrant=reentrant)
    model.where, model.reentrant = where, reentrant
    return model


@functools.cache
def run(where, reentrant, forwards, together, compiled=False):
    """All that a run computes and decides; ``together``: one backward for a step's forwards."""
    torch.manual_seed(0)
    model = Net()
    call = checkpointed(model, where, reentrant)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
    x, target = torch.randn(ROWS, 4), torch.arange(ROWS) % 3
    pruner = LayerPruner(model, example_inputs=x, total_steps=STEPS, strength=0.2, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, thetas = [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        parts = []
        for _ in range(forwards):
            parts.append(nn.functional.cross_entropy(call(torch.randn(ROWS, 4)), target) / forwards)
            if not together:
                parts[-1].backward()
        if together:
            sum(reversed(parts)).backward()
        optimizer.step()
        pruner.step(optimizer, accumulation=forwards)
        optimizer.zero_grad()
        losses.append(torch.stack(parts).detach())
        thetas.append([info.theta for info in pruner.sections])
    events = [(e.step, e.decision, e.difference, e.section.split(".")[1]) for e in pruner.events]
    assert "eliminated" in [event[1] for event in events] and pruner.ledger.test_flops > 0
    return torch.stack(losses), torch.tensor(thetas), events


CASES = [
    *[
        (where, way)
        for where in ("branch", "sections", "wrapper", "stack")
        for way in (False, True)
    ],
    ("nested", False),
    ("model", False),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("forwards", "together"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(("where", "reentrant"), CASES)
def test_a_checkpointed_run_is_the_plain_one(where, reentrant, forwards, together):
    """Bit for bit: losses, keep probabilities (which follow the gates' gradients), measurements."""
    expected = run(None, None, forwards, together)
    found = run(where, reentrant, forwards, together)
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])
    assert found[2] == expected[2]


@pytest.mark.slow
def test_a_compiled_checkpointed_run_is_the_plain_one():
    expected = run(None, None, 1, False)
    found = run("sections", False, 1, False, compiled=True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert [event[1::2] for event in found[2]] == [event[1::2] for event in expected[2]]


def test_other_forwards_between_a_forward_and_its_backward():
    """One without a graph, and one in evaluation mode: the backward repeats its own."""
    grads = []
    for where in (None, "sections"):
        torch.manual_seed(0)
        model = Net()
        call = checkpointed(model, where, False)
        x = torch.randn(ROWS, 4)
        pruner = LayerPruner(model, example_inputs=x, total_steps=STEPS, strength=0.2, seed=2)
        loss = call(x).square().sum()
        gates = [gate.draw.gate for gate in pruner._run.bank.gates]
        with torch.no_grad():
            call(x)
            call(x)
            model.eval()
            call(x)
            model.train()
        loss.backward()
        probed = [gate for gate in gates if gate.grad is not None]
        grads.append([p.grad for p in (*model.parameters(), *probed)])
    assert probed
    for found, expected in zip(*grads, strict=True):
        assert found.equal(expected)


def test_a_reentrant_checkpoint_around_the_whole_model_is_refused():
    """Its forward has no graph: the gates' gradients would be missing, without a word."""
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(ROWS, 4, requires_grad=True)
    LayerPruner(model, example_inputs=x, total_steps=STEPS, strength=0.2)
    loss = checkpoint(model, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="needs use_reentrant=False"):
        loss.backward()


def test_a_recomputation_that_could_be_of_either_forward_is_refused():
    """Checkpoints within reentrant ones, and two forwards: nothing tells whose draw it is."""
    torch.manual_seed(0)
    model = Net()
    call = checkpointed(model, "nested", True)
    x = torch.randn(ROWS, 4)
    LayerPruner(model, example_inputs=x, total_steps=STEPS, strength=0.2)
    loss = call(x).sum() + call(x).sum()
    with pytest.raises(RuntimeError, match="which of 2 forwards"):
        loss.backward()
