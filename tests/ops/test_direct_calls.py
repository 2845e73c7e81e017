"""Operators called past the public functions: the compiled kernels refuse what would harm."""

import pytest
import torch

LIBRARY = torch.ops.layerprune
X = torch.zeros(4, 3)

pytestmark = pytest.mark.usefixtures("compiled")


def value(*case):
    """A case that its values make wrong: those of another device nobody reads."""
    return pytest.param(*case, marks=pytest.mark.cpu_only("values are checked there"))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows(*values):
    return torch.tensor(values, dtype=torch.int64)


def draw(
    theta=(0.5, 0.5), batch=4, rate=(0.0, 0.0), state=(1, 2, 3), multiple=1, scheme="systematic"
):
    return LIBRARY.sample_gates(
        torch.tensor(theta), batch, torch.tensor(state), torch.tensor(rate), 0, multiple, scheme
    )


def sampled(theta=0.5, state=(1, 2, 3)):
    return LIBRARY.sampled_gated_residual(
        X, X, torch.tensor(theta), torch.tensor(state), 0, False, False
    )


def step(theta=None, statistics=None, slope=None, counted=None, penalty=1.0):
    return LIBRARY.projected_gate_step_(
        torch.full((3,), 0.5) if theta is None else theta,
        torch.zeros(5, 3) if statistics is None else statistics,
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, 4) if slope is None else slope,
        torch.ones(3, 4, dtype=torch.bool) if counted is None else counted,
        torch.full((3,), penalty),
        torch.ones(3, dtype=torch.bool),
        10.0, 0.0, 1.0, 1.0, 1,
    )  # fmt: skip


NAN = float("nan")
HELD = torch.zeros(4, 3)
STATISTICS = torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        value(lambda: LIBRARY.gather_rows(X, rows(0, 4)), r"rows\[1\] is 4, but there are 4 rows"),
        value(lambda: LIBRARY.gather_rows(X, rows(-1)), r"rows\[0\] is -1"),
        value(lambda: LIBRARY.gather_rows(X, rows(1, 1)), "rows has row 1 twice"),
        (lambda: LIBRARY.gather_rows(X, ints(1)), r"rows must be int64 of shape \[1\], got int32"),
        value(lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0, 4), X[:2]), r"rows\[1\] is 4"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0), X[:2]), "source has 2 rows for 1"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0), X[:1].half()), "source .* dtype"),
        (lambda: LIBRARY.scatter_add_rows_(torch.zeros(3, 4).t(), rows(0), X[:1]), "out must be"),
        value(
            lambda: LIBRARY.gate_factor(X, X[:2], ints(0, 5, 1, -1), None, False), r"slot\[1\] is 5"
        ),
        value(lambda: LIBRARY.gate_factor(X, X, None, rows(9), True), r"gate_grad_rows\[0\] is 9"),
        value(lambda: draw(theta=(0.5, 1.5)), r"theta\[1\] is 1.5, not in \[0, 1\]"),
        value(lambda: draw(theta=(NAN, 0.5)), r"theta\[0\] is nan"),
        value(lambda: draw(rate=(0.0, -1.0)), r"probe_rate\[1\] is -1"),
        (lambda: draw(rate=(0.0,)), r"probe_rate must be float32 of shape \[2\], got .* \[1\]"),
        (lambda: draw(batch=-1), "a batch of -1 rows"),
        (lambda: draw(multiple=0), "multiples of 0"),
        (lambda: draw(state=(1, 2)), r"rng_state must be int64 of shape \[3\]"),
        (lambda: draw(scheme="sobol"), "unknown scheme sobol"),
        (lambda: step(statistics=torch.zeros(4, 3)), r"must be float32 of shape \[5, 3\]"),
        (lambda: step(slope=torch.zeros(3, 5)), "counted must be bool"),
        value(lambda: draw(state=(1, 2, -1)), "first global row, is -1"),
        value(lambda: sampled(theta=NAN), r"theta\[0\] is nan"),
        value(lambda: sampled(state=(1, 2, 1 << 32)), "first global row, is 4294967296"),
        (lambda: step(slope=torch.zeros(12)), "slope must have two dimensions"),
        (lambda: step(theta=torch.tensor(0.5).expand(3)), "theta is updated in place, but element"),
        (lambda: step(statistics=torch.zeros(7).as_strided((5, 3), (1, 1))), "statistics is updat"),
        (lambda: step(STATISTICS[4], STATISTICS), "theta and statistics share memory"),
        value(lambda: step(penalty=0.0), r"penalty\[0\] is 0, not positive"),
        (lambda: LIBRARY.scatter_add_rows_(HELD, rows(1, 2), HELD[:2]), "out and source share"),
    ],
)  # fmt: skip
def test_refused(call, message):
    """A RuntimeError that names the argument and what was got."""
    with pytest.raises(RuntimeError, match=rf"layerprune: .*{message}"):
        call()
