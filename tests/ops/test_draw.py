"""The draw: bit-equal to a plain implementation, exact counts, exact marginals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from layerprune import ops

SCHEMES = ["systematic", "independent"]
probabilities = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 2.0**-24, 1 - 2.0**-24]), st.floats(0, 1, width=32)
)


def _state(seed=0, number=0, first=0):
    return torch.tensor([seed, number, first])


def _draw(theta, batch, state, rate, **options):
    return ops.sample_gates(torch.tensor(theta), batch, state, torch.tensor(rate), **options)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    theta=st.lists(probabilities, max_size=4),
    batch=st.integers(0, 20),
    seed=st.integers(-(2**63), 2**63 - 1),
    number=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**32 - 30),
    rate=probabilities,
    min_rows=st.integers(0, 25),
    row_multiple=st.integers(1, 9),
    scheme=st.sampled_from(SCHEMES),
)
def test_equals_the_plain_implementation(
    plain, theta, batch, seed, number, first, rate, min_rows, row_multiple, scheme
):
    """Every output is bit-equal; the lists hold -1 behind their counts."""
    rates = [rate] * len(theta)
    options = {"min_rows": min_rows, "row_multiple": row_multiple, "scheme": scheme}
    drawn = ops.sample_gates(
        torch.tensor(theta, dtype=torch.float32),
        batch,
        _state(seed, number, first),
        torch.tensor(rates, dtype=torch.float32),
        **options,
    )
    shape = (len(theta), batch)
    assert [t.shape for t in drawn] == [shape] * 4 + [(len(theta), 2)]
    dtypes = [torch.float32, torch.int32, torch.int64, torch.int64, torch.int64]
    assert [t.dtype for t in drawn] == dtypes
    expected = plain.draw(
        np.float32(theta), batch, (seed, number, first), np.float32(rates), **options
    )
    for section, (gates, rows, probes) in enumerate(expected):
        assert drawn.gates[section].cpu().numpy().tobytes() == gates.tobytes()
        assert drawn.rows[section].tolist() == rows + [-1] * (batch - len(rows))
        assert drawn.probes[section].tolist() == probes + [-1] * (batch - len(probes))
        assert drawn.counts[section].tolist() == [len(rows), len(probes)]
        slots = [rows.index(b) if b in rows else -1 for b in range(batch)]
        assert drawn.slots[section].tolist() == slots


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_vertices_are_deterministic(scheme, batch):
    """Without probes theta 0 opens nothing and theta 1 everything; a probe rate of 1 is total."""
    for number in range(5):
        drawn = _draw([0.0, 1.0], batch, _state(3, number), [0.0, 0.0], min_rows=0, scheme=scheme)
        assert drawn.gates[0].eq(0).all() and drawn.gates[1].eq(1).all()
        assert drawn.counts.tolist() == [[0, 0], [batch, 0]]
        drawn = _draw([0.0, 1.0], batch, _state(3, number), [1.0, 1.0], scheme=scheme)
        assert ((drawn.gates > 0) & (drawn.gates < 1)).all()
        assert drawn.counts.tolist() == [[batch, batch]] * 2


def test_row_counts_are_floor_or_ceil():
    """The systematic numbers of probes and of open rows are one of two neighbours, always."""
    theta = torch.linspace(0, 1, 21)
    for rate in (0.0, 0.03, 0.125, 0.5):
        for batch in (1, 13, 64):
            for number in range(20):
                drawn = ops.sample_gates(
                    theta, batch, _state(1, number), torch.full_like(theta, rate), min_rows=0
                )
                running, probes = drawn.counts.double().unbind(1)
                assert ((probes - np.float32(rate).item() * batch).abs() < 1).all()
                assert ((running - probes - theta.double() * (batch - probes)).abs() < 1).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_marginals(scheme, rate):
    """Every row is open with probability theta, and a probe with probability probe_rate.

    4000 draws of 13 rows and 5 sections, with padding: 4 * 65 frequencies of open rows among
    the rows that are no probes, and of probes, each within 5 standard deviations of a binomial.
    False alarm of one below 6e-7, of the whole test below 3e-4.
    """
    theta = torch.tensor([0.05, 0.3, 0.5, 0.77, 1.0])
    draws, batch = 4000, 13
    opened, probed = torch.zeros(5, batch), torch.zeros(5, batch)
    for number in range(draws):
        drawn = ops.sample_gates(
            theta,
            batch,
            _state(11, number),
            torch.full((5,), rate),
            min_rows=2,
            row_multiple=4,
            scheme=scheme,
        )
        probe = (drawn.gates > 0) & (drawn.gates < 1)
        assert (probe.sum(1) == drawn.counts[:, 1]).all()
        opened += drawn.gates == 1
        probed += probe

    def deviations(count, total, probability):
        spread = (total * probability * (1 - probability)).sqrt().clamp(min=1e-6)
        return (count - total * probability).abs() / spread

    total = draws - probed
    assert deviations(opened, total, theta.unsqueeze(1)).max() < 5
    assert deviations(probed, torch.tensor(float(draws)), torch.tensor(rate)).max() < 5


def test_probe_gates_are_stratified_and_uniform():
    """One gate of a section's P probes lies in each [j/P, (j+1)/P), uniformly and in random order.

    Chi-square of 8000 gates in 50 cells, and of the first row's 1000 gates in 10 cells, at a
    false-alarm rate of 1e-6 each (99.9999 % quantiles 111.2 and 44.9 for 49 and 9 degrees of
    freedom).
    """
    gates, first = [], []
    for number in range(1000):
        drawn = _draw([0.4], 8, _state(5, number), [1.0])
        strata = (drawn.gates[0].double() * 8).floor()
        assert strata.sort()[0].tolist() == list(range(8))
        gates.append(drawn.gates[0])
        first.append(drawn.gates[0, 0])
    for values, cells, bound in ((torch.cat(gates), 50, 111.2), (torch.stack(first), 10, 44.9)):
        found = torch.histc(values, cells, 0, 1)
        expected = values.numel() / cells
        assert ((found - expected) ** 2 / expected).sum() < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sections_are_independent_of_each_other(scheme):
    """A section's draw depends on its own number, theta and probe rate only."""
    theta, rate = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.1, 0.0, 0.3])
    drawn = ops.sample_gates(theta, 32, _state(9, 4), rate, scheme=scheme)
    changed = ops.sample_gates(
        torch.tensor([0.7, 0.5]), 32, _state(9, 4), torch.tensor([0.4, 0.0]), scheme=scheme
    )
    for tensor, other in zip(drawn, changed, strict=True):
        assert torch.equal(tensor[1], other[1])
    again = ops.sample_gates(theta, 32, _state(9, 4), rate, scheme=scheme)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_micro_batches_continue_the_stream():
    """Under the independent scheme, a batch in two halves is the batch; offsets never repeat."""
    theta, rate = torch.full((4,), 0.5), torch.full((4,), 0.2)
    whole = ops.sample_gates(theta, 64, _state(2, 3), rate, scheme="independent").gates
    halves = [
        ops.sample_gates(theta, 32, _state(2, 3, first), rate, scheme="independent").gates
        for first in (0, 32)
    ]
    assert torch.equal(whole, torch.cat(halves, dim=1))
    for other in (_state(2, 4), _state(2, 3, 64), _state(3, 3)):
        assert not torch.equal(
            whole, ops.sample_gates(theta, 64, other, rate, scheme="independent").gates
        )


def test_padding_changes_no_gate():
    """Padding takes gate-0 rows only and never changes a gate."""
    theta, rate = torch.rand(8, generator=torch.Generator().manual_seed(0)), torch.full((8,), 0.1)
    bare = ops.sample_gates(theta, 30, _state(6), rate, min_rows=0)
    padded = ops.sample_gates(theta, 30, _state(6), rate, min_rows=9, row_multiple=8)
    assert torch.equal(bare.gates, padded.gates) and torch.equal(bare.probes, padded.probes)
    for before, after, count in zip(bare.slots, padded.slots, padded.counts[:, 0], strict=True):
        assert (after[before >= 0] >= 0).all()
        assert count in (16, 24, 30)


def test_padding_beyond_the_batch_is_the_batch():
    """The greatest numbers that fit mean all rows; no row needs none to be padded to a multiple."""
    most = 2**63 - 1
    for options in ({"min_rows": most, "row_multiple": 2}, {"row_multiple": most}):
        drawn = _draw([0.5], 5, _state(), [0.0], **options)
        assert drawn.counts.tolist() == [[5, 0]]
    drawn = _draw([0.0], 5, _state(), [0.0], min_rows=0, row_multiple=most)
    assert drawn.counts.tolist() == [[0, 0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme):
    """Schema, fake implementation and dynamic shapes."""
    arguments = (torch.tensor([0.2, 0.8]), 7, _state(1, 2, 3), torch.tensor([0.3, 0.0]), 2, 3)
    torch.library.opcheck(torch.ops.layerprune.sample_gates.default, (*arguments, scheme))


def value(*case):
    """A case that its values make wrong: those of another device nobody reads."""
    return pytest.param(*case, marks=pytest.mark.cpu_only("values are checked there"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value({"theta": torch.tensor([0.5, 1.5])}, r"theta must lie in \[0, 1\]"),
        value({"theta": torch.tensor([0.5, torch.nan])}, r"theta must lie in \[0, 1\]"),
        ({"theta": torch.zeros(2, dtype=torch.float64)}, "theta must be torch.float32"),
        ({"theta": torch.zeros(2, 2)}, r"theta must be .* got torch.float32 of shape \[2, 2\]"),
        ({"theta": torch.tensor(0.5)}, "theta must be torch.float32 with one dimension"),
        value({"probe_rate": torch.tensor([-0.1, 0.0])}, "probe_rate must lie"),
        ({"probe_rate": torch.zeros(3)}, r"probe_rate must be torch.float32 of shape \[2\]"),
        ({"batch_size": -1}, "batch_size"),
        ({"batch_size": 2**29}, "batch_size must lie in"),
        ({"rng_state": torch.tensor([1, 2])}, "rng_state must be"),
        ({"rng_state": torch.tensor([1.0, 2.0, 3.0])}, "rng_state must be torch.int64"),
        value({"rng_state": torch.tensor([1, 2, 2**32 - 4])}, "first global row"),
        value({"rng_state": torch.tensor([1, 2, -1])}, "first global row"),
        ({"scheme": "sobol"}, "scheme must be one of"),
        ({"row_multiple": 0}, "row_multiple at least 1"),
        ({"theta": torch.zeros(2, device="meta")}, r"probe_rate is on (?!meta)"),
    ],
)
def test_errors(change, message):
    """Each bad argument is named, with what was got."""
    arguments = {
        "theta": torch.tensor([0.5, 1.0]),
        "batch_size": 4,
        "rng_state": _state(),
        "probe_rate": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        ops.sample_gates(**(arguments | change))


def test_takes_tensors_only():
    with pytest.raises(TypeError, match="theta must be a tensor, got list"):
        ops.sample_gates([0.5], 4, _state(), torch.zeros(1))


def test_without_values():
    """Under fakes, and within vmap, nothing looks at the values."""
    with FakeTensorMode():
        drawn = ops.sample_gates(torch.rand(3), 5, torch.tensor([1, 2, 0]), torch.rand(3))
        assert drawn.rows.shape == (3, 5)
    theta, rate = torch.rand(2, 3), torch.full((3,), 0.25)
    gates = torch.vmap(lambda keep: ops.sample_gates(keep, 5, _state(), rate).gates)(theta)
    expected = [ops.sample_gates(keep, 5, _state(), rate).gates for keep in theta]
    assert torch.equal(gates, torch.stack(expected))
