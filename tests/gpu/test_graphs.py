"""CUDA graphs: what is captured once gives, at every replay, what a call would give."""

import pytest
import torch
from torch.nn import functional as F

from layerprune import LayerPruner
from layerprune.models import resnet

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

WARM_UPS = 3
TOTAL_STEPS = 100


def warm(function):
    """Calls on a side stream, as a capture asks for: libraries set themselves up in them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)


def capture(function):
    """The graph of one call and what the call returned, which every replay writes anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def overwrite(held, new):
    """Puts new values where the captured call reads them."""
    for name, tensor in vars(held).items():
        tensor.copy_(getattr(new, name))


def test_every_operation(every):
    """Forward and backward, the draws and the step on other values, bit for bit."""
    held = every.values(0)
    warm(lambda: every.run(held))
    graph, results = capture(lambda: every.run(held))
    for seed in (1, 2, 3):
        new = every.values(seed)
        expected = every.run(new)
        overwrite(held, new)
        graph.replay()
        assert every.equal(results, expected)


def test_a_draw_advances_with_its_state(every):
    """The counter is read at every replay: no two draws are the same, each is that of a call."""
    held, plain = every.values(0), every.values(0)
    warm(lambda: every.run(held))

    def run():
        held.state[1] += 1
        return every.run(held)

    graph, results = capture(run)
    gates = results[2]
    seen = []
    for _ in range(4):
        graph.replay()
        plain.state[1] += 1
        assert every.equal(results, every.run(plain))
        seen.append(gates.tolist())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_learning_in_place(every):
    """A captured step goes on from the state that the one before has left."""
    held, plain = every.values(1), every.values(1)
    start = every.values(1)
    warm(lambda: every.learn_(held))
    graph, _ = capture(lambda: every.learn_(held))
    overwrite(held, start)
    for _ in range(10):
        graph.replay()
        every.learn_(plain)
        for name in ("theta", "statistics", "in_play"):
            assert torch.equal(getattr(held, name), getattr(plain, name))
    assert not torch.equal(held.theta, start.theta)


def test_graphs_in_any_order(every):
    """No two of them share what one call has set up: the one captured last is replayed first."""
    runs = [(every.values(seed), every.values(seed)) for seed in (1, 2)]
    for held, plain in runs:
        warm(lambda held=held: every.learn_(held))
        for _ in range(WARM_UPS):
            every.learn_(plain)
    graphs = [capture(lambda held=held: every.learn_(held))[0] for held, _ in runs]
    for graph, (held, plain) in reversed(list(zip(graphs, runs, strict=True))):
        graph.replay()
        every.learn_(plain)
        for name in ("theta", "statistics", "in_play"):
            assert torch.equal(getattr(held, name), getattr(plain, name))


class CoolDown:
    """A small residual network in cool-down, two of its sections settled and one eliminated."""

    def __init__(self):
        self.x, self.y = batch(0)
        state = self.begin().state_dict()
        state["status"] = ["settled", "eliminated", "settled"]
        state["bank"]["theta"] = torch.tensor([1.0, 0.0, 1.0])
        state["step_count"] = TOTAL_STEPS // 2
        state["learning_since"] = 1
        self.pruner = self.begin()
        self.pruner.load_state_dict(state)
        self.model = self.pruner.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, capturable=True)

    def begin(self):
        """A pruner at its start, on a network of its own."""
        torch.manual_seed(0)
        return LayerPruner(
            resnet(8, image_size=8, width=8).cuda(),
            example_inputs=self.x[:2],
            total_steps=TOTAL_STEPS,
            strength=0.01,
        )

    def step(self):
        """One step of training on the batch that lies in ``x`` and ``y``; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss

    def give(self, number):
        """Puts a batch where the steps read it."""
        for held, new in zip((self.x, self.y), batch(number), strict=True):
            held.copy_(new)


def batch(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    return x.cuda(), torch.randint(0, 10, (32,), generator=generator).cuda()


@pytest.mark.usefixtures("deterministic")
def test_a_training_step_in_cool_down():
    """Forward, backward and optimizer in one graph; the pruner's own step stays outside.

    The convolution library may choose another algorithm while capturing, and Adam divides by the
    gradient's size: a tenth of one step's length is allowed, one step more or less would show.
    """
    eager, captured = CoolDown(), CoolDown()
    warm(eager.step)
    warm(captured.step)
    graph, loss = capture(captured.step)
    for number in range(1, 6):
        for training in (eager, captured):
            training.give(number)
        expected = eager.step()
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        for training in (eager, captured):
            report = training.pruner.step(training.optimizer)
            assert report.phase == "cool-down" and not report.events
    states = [training.model.state_dict() for training in (eager, captured)]
    assert states[0].keys() == states[1].keys()
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)
