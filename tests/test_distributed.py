"""Two ranks decide as one, go on after a compaction, and notice when they come apart."""

import itertools
import os

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from layerprune import GatedResidual, LayerPruner, PruneConfig, ops

ROWS, STEPS = 64, 200
pytestmark = [
    pytest.mark.cpu_only("gloo"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo"),
]


def _model(norm=False, seed=0):
    torch.manual_seed(seed)
    blocks = [
        GatedResidual(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh())
        )
        for _ in range(4)
    ]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 3)).double()


def _batch(step, seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + 0.3 * x[:, 3:].square()).argmax(1)


class Run:
    """A run of a few steps on one rank or on some."""

    def __init__(self, rank=0, count=1, norm=False, seed=0, **options):
        self.rank, self.count, self.seed = rank, count, seed
        self.model = _model(norm, seed)
        config = PruneConfig(warm_up=0.02, warm_up_limit=0.04, min_rows=2)
        settings = {"total_steps": STEPS, "strength": 0.05, "config": config, "seed": seed}
        self.pruner = LayerPruner(
            self.model, example_inputs=torch.zeros(2, 6).double(), **settings | options
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.wrapped = DistributedDataParallel(self.model) if count > 1 else self.model
        self.digests, self.running = [], []

    def step(self, x, y, drawn=None):
        if drawn is not None:
            self.pruner.draw(len(x), drawn)
        F.cross_entropy(self.wrapped(x), y).backward()
        self.optimizer.step()
        report = self.pruner.step(self.optimizer)
        self.optimizer.zero_grad()
        if report.changed and self.count > 1:
            assert self.pruner.rewrap(self.wrapped) is self.wrapped
        self.digests.append(self.pruner.digest())
        return report

    def events(self):
        return [(event.step, event.section, event.decision) for event in self.pruner.events]


def _part(tensors, rank, count):
    return [tensor.chunk(count)[rank] for tensor in tensors]


def _drawn(step, seed, rank, count):
    """The gates of one batch, of which a rank has its rows: half are open, some are probes."""
    sections = 4
    state = torch.tensor([seed + 77, step, 0])
    rates = torch.full((sections,), 0.1)
    whole = ops.sample_gates(torch.full((sections,), 0.5), ROWS, state, rates)
    gates = whole.gates.chunk(count, 1)[rank].contiguous()
    open_, probe = gates > 0, (gates > 0) & (gates < 1)
    slots = torch.where(open_, open_.cumsum(1) - 1, -1).int()
    tables = []
    for mask in (open_, probe):
        order = torch.where(mask, torch.arange(gates.shape[1]), gates.shape[1]).sort(1).values
        tables.append(torch.where(order < gates.shape[1], order, -1))
    counts = torch.stack((open_.sum(1), probe.sum(1)), 1)
    return ops.GateDraw(gates, slots, *tables, counts)


def _same_gates(rank, count, seed):
    run = Run(rank, count, seed=seed)
    for step in range(STEPS):
        run.step(*_part(_batch(step, seed), rank, count), _drawn(step, seed, rank, count))
    return run.events(), run.digests, run.model.state_dict()


@pytest.mark.parametrize("seed", [0, 1])
def test_two_ranks_decide_what_one_decides(seed):
    """Half of the batch each, without BatchNorm, with the gates given: the same eliminations."""
    alone = _same_gates(0, 1, seed)
    one, two = run_ranks(_same_gates, 2, 2, seed)
    assert {"eliminated"} <= {decision for _, _, decision in alone[0]}
    assert one[0] == two[0] == alone[0]
    assert one[1] == two[1]
    assert one[2].keys() == alone[2].keys()
    for name, value in one[2].items():
        assert value.equal(two[2][name])
        torch.testing.assert_close(value, alone[2][name], rtol=1e-5, atol=1e-6)


def _uneven(rank, sizes):
    """Drawn by the pruner, with BatchNorm, the last batch of an epoch smaller on some ranks."""
    run = Run(rank, 2, norm=True)
    running = []
    for step in range(STEPS):
        rows = sizes[rank] if step % 5 == 4 else ROWS // 2
        run.step(*_batch(2 * step + rank, rows=rows))
        running.append(
            [
                len(gate.draw.rows)
                for gate in run.pruner._run.bank.gates
                if hasattr(gate.draw, "rows")
            ]
        )
    weights = {name: value.detach() for name, value in run.model.named_parameters()}
    return run.events(), run.digests, running, weights


@pytest.mark.parametrize("sizes", [(32, 32), (20, 3)])
def test_uneven_last_batches_neither_hang_nor_part_the_ranks(sizes):
    one, two = run_ranks(_uneven, 2, sizes)
    assert one[0] == two[0] and "eliminated" in {decision for _, _, decision in one[0]}
    assert one[1] == two[1] and len(set(one[1])) == STEPS
    assert all(value.equal(two[3][name]) for name, value in one[3].items())
    full = [step for step in range(STEPS) if step % 5 != 4]
    assert all(one[2][step] == two[2][step] for step in full)


def _resumed(rank, moments):
    """Goes on from states saved at some steps, on a pruner made anew; compares the ends."""
    run, states, changed = Run(rank, 2, norm=True), {}, []
    for step in range(STEPS):
        if step in moments:
            weights = {name: value.clone() for name, value in run.model.state_dict().items()}
            states[step] = (run.pruner.state_dict(), weights, run.optimizer.state_dict())
            states[step] = torch.utils._pytree.tree_map(_copied, states[step])
        if run.step(*_batch(2 * step + rank, rows=ROWS // 2)).changed:
            changed.append(step)
    for start, (state, weights, stepper) in states.items():
        other = Run(rank, 2, norm=True)
        other.pruner.load_state_dict(state)
        other.model.load_state_dict(weights)
        other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1, momentum=0.9)
        other.optimizer.load_state_dict(stepper)
        other.pruner.rewrap(other.wrapped)
        for step in range(start, STEPS):
            other.step(*_batch(2 * step + rank, rows=ROWS // 2))
        assert other.digests == run.digests[start:]
        for name, value in run.model.state_dict().items():
            assert other.model.state_dict()[name].equal(value), (start, name)
    digest = {step: repr(_plain(state[0])) for step, state in states.items()}
    return changed, digest


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def _plain(state):
    """Without what is each rank's own: its times and operations."""
    return {key: value for key, value in state.items() if key != "ledger"}


def test_a_resumed_run_goes_on_bit_for_bit_on_two_ranks():
    moments = (3, 20, 21, 22, 30, 46, 120)  # eliminations in steps 21 to 47 (from 0)
    one, two = run_ranks(_resumed, 2, moments)
    assert one == two, "the state is the same on every rank"
    assert min(one[0]) > 3 and any(
        first < moment < last for moment in moments for first, last in itertools.pairwise(one[0])
    )


def _apart(rank, how):
    run = Run(rank, 2, seed=0, **({"strength": 0.05 + 0.01 * rank} if how == "strength" else {}))
    with pytest.raises(RuntimeError, match="rank 1's pruner is not that of rank 0"):
        for step in range(3):
            if how == "theta" and step == 1 and rank == 1:
                run.pruner._run.bank.theta[0] += 0.01
            run.step(*_batch(step))


@pytest.mark.parametrize("how", ["strength", "theta"])
def test_ranks_that_come_apart_are_told(how):
    run_ranks(_apart, 2, how)


def _not_finite(rank):
    run = Run(rank, 2)
    run.step(*_batch(0))
    x, y = _batch(1)
    F.cross_entropy(run.wrapped(x), y).backward()
    if rank == 1:
        graded = next(gates for gates, _ in run.pruner._run.bank._pending)
        next(iter(graded.values())).grad[:] = torch.nan
    run.pruner.step(run.optimizer)
    run.optimizer.zero_grad()
    with pytest.raises(FloatingPointError, match="step 2"):
        run.step(*_batch(2))


def test_what_overflows_on_one_rank_ends_the_run_on_all():
    run_ranks(_not_finite, 2)


def _skipped(rank):
    """One rank saw an overflow and says so; the others learn that the step is to be left out."""
    run = Run(rank, 2)
    for step in range(4):
        x, y = _batch(step)
        F.cross_entropy(run.wrapped(x), y).backward()
        if step == 1 and rank == 1:
            graded = next(gates for gates, _ in run.pruner._run.bank._pending)
            next(iter(graded.values())).grad[:] = torch.nan
        run.pruner.step(run.optimizer, skipped=step == 1 and rank == 1)
        run.optimizer.zero_grad()
    return run.pruner.digest(), bool(run.pruner._learner.statistics.isfinite().all())


def test_a_step_skipped_on_one_rank_is_skipped_on_all():
    one, two = run_ranks(_skipped, 2)
    assert one == two and one[1]


def _other_model(rank):
    model = nn.Sequential(nn.Linear(6, 8), *list(_model())[1 : 4 + rank], nn.Linear(8, 3)).double()
    with pytest.raises(RuntimeError, match="other sections than each other"):
        LayerPruner(model, example_inputs=torch.zeros(2, 6).double(), total_steps=99, strength=1.0)


def test_ranks_with_other_models_are_told():
    run_ranks(_other_model, 2)


def _lost(rank):
    run = Run(rank, 2)
    run.step(*_batch(0))
    if rank == 1:
        os._exit(3)
    with pytest.raises(RuntimeError):
        for step in range(1, 5):
            run.step(*_batch(step))
    return "noticed"


def test_a_rank_that_dies_is_noticed_by_the_others():
    """An error in the survivor, not a hang."""
    assert run_ranks(_lost, 2, lost=[1]) == ["noticed", None]


def test_a_process_group_that_comes_after_the_pruner_is_refused():
    run_ranks(_early, 2)


def _early(rank):
    run = Run(rank, 1)
    run.pruner.ranks.count = 1
    with pytest.raises(RuntimeError, match="init_process_group before making it"):
        run.step(*_batch(0))


def _wrapper(rank):
    """A renewed wrapper keeps its options, hooks and mode, and its old reducer is silent."""
    run = Run(rank, 2)
    calls = []
    run.wrapped = DistributedDataParallel(
        run.model, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=1
    )
    run.wrapped.register_forward_hook(lambda *_: calls.append("forward"))
    run.wrapped.register_comm_hook(None, _halved)
    run.wrapped.eval()
    before = {
        name: getattr(run.wrapped, name)
        for name in (
            "bucket_bytes_cap",
            "gradient_as_bucket_view",
            "find_unused_parameters",
            "training",
            "process_group",
            "device_ids",
            "dim",
            "static_graph",
        )
    }
    run.pruner.rewrap(run.wrapped)
    assert {name: getattr(run.wrapped, name) for name in before} == before
    assert not run.wrapped.broadcast_buffers and run.wrapped.module is run.model
    run.wrapped.train()
    x, y = _batch(rank)
    F.cross_entropy(run.wrapped(x), y).backward()
    found = [p.grad.clone() for p in run.model.parameters()]
    assert calls == ["forward"]
    run.optimizer.zero_grad()
    # The same gradients from a wrapper made anew, halved by the hook.
    run.pruner._run.bank.draw_number -= 1
    other = DistributedDataParallel(run.model)
    run.wrapped._remove_autograd_hooks()
    F.cross_entropy(other(x), y).backward()
    for mine, parameter in zip(found, run.model.parameters(), strict=True):
        torch.testing.assert_close(2 * mine, parameter.grad)
    for wrong, error in ((run.model, TypeError), (DistributedDataParallel(_model()), ValueError)):
        with pytest.raises(error, match="ddp"):
            run.pruner.rewrap(wrong)
    with pytest.raises(TypeError, match="ddp.module"):
        LayerPruner(other, example_inputs=torch.zeros(2, 6).double(), total_steps=9, strength=1.0)


def _halved(state, bucket):
    future = torch.distributed.all_reduce(bucket.buffer() / 4, async_op=True).get_future()
    return future.then(lambda found: found.value()[0])


def test_a_wrapper_is_renewed_as_it_was():
    run_ranks(_wrapper, 2)


def _sharded(rank):
    from torch.distributed.fsdp import fully_shard

    model = _model().float()
    settings = {"example_inputs": torch.zeros(2, 6), "total_steps": 100, "strength": 0.1}
    with pytest.raises(TypeError, match="FSDP is not supported"):
        LayerPruner(fully_shard(_model().float()), **settings)
    LayerPruner(model, **settings)
    fully_shard(model)
    with pytest.raises(TypeError, match="FSDP is not supported"):
        model(torch.zeros(4, 6))


def test_sharded_models_are_refused_before_and_after():
    run_ranks(_sharded, 2)
