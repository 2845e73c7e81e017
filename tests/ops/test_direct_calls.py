"""Operators called past the public functions: the compiled kernels refuse what would harm."""

import pytest
import torch

LIBRARY = torch.ops.layerprune
X = torch.zeros(4, 3)


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


def step(theta=None, statistics=None, slope=None, counted=None):
    return LIBRARY.projected_gate_step_(
        torch.full((3,), 0.5) if theta is None else theta,
        torch.zeros(5, 3) if statistics is None else statistics,
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, 4) if slope is None else slope,
        torch.ones(3, 4, dtype=torch.bool) if counted is None else counted,
        torch.ones(3),
        torch.ones(3, dtype=torch.bool),
        10.0, 0.0, 1.0, 1.0, 1,
    )  # fmt: skip


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LIBRARY.gather_rows(X, rows(0, 4)), r"rows\[1\] is 4, but there are rows 0 to 3"),
        (lambda: LIBRARY.gather_rows(X, rows(-1)), r"rows\[0\] is -1"),
        (lambda: LIBRARY.gather_rows(X, rows(1, 1)), "rows has row 1 twice"),
        (lambda: LIBRARY.gather_rows(X, ints(1)), r"rows must be int64 of shape \[1\], got int32"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0, 4), X[:2]), r"rows\[1\] is 4"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0), X[:2]), "source has 2 rows for 1"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0), X[:1].half()), "source .* dtype"),
        (lambda: LIBRARY.scatter_add_rows_(torch.zeros(3, 4).t(), rows(0), X[:1]), "out must be"),
        (lambda: LIBRARY.gate_factor(X, X[:2], ints(0, 5, 1, -1), None, False), r"slot\[1\] is 5"),
        (lambda: LIBRARY.gate_factor(X, X, None, rows(9), True), r"gate_grad_rows\[0\] is 9"),
        (lambda: draw(theta=(0.5, 1.5)), r"theta\[1\] is 1.5, not in \[0, 1\]"),
        (lambda: draw(theta=(NAN, 0.5)), r"theta\[0\] is nan"),
        (lambda: draw(rate=(0.0, -1.0)), r"probe_rate\[1\] is -1"),
        (lambda: draw(rate=(0.0,)), r"probe_rate must be float32 of shape \[2\], got .* \[1\]"),
        (lambda: draw(batch=-1), "a batch of -1 rows"),
        (lambda: draw(multiple=0), "multiples of 0"),
        (lambda: draw(state=(1, 2)), r"rng_state must be int64 of shape \[3\]"),
        (lambda: draw(scheme="sobol"), "unknown scheme sobol"),
        (lambda: step(statistics=torch.zeros(4, 3)), r"must be float32 of shape \[5, 3\]"),
        (lambda: step(slope=torch.zeros(3, 5)), "counted must be bool"),
        (lambda: step(slope=torch.zeros(12)), "slope must be float32"),
        (lambda: step(theta=torch.tensor(0.5).expand(3)), "theta is updated in place, but several"),
    ],
)  # fmt: skip
def test_refused(call, message, compiled):
    """A RuntimeError that names the argument and what was got."""
    with pytest.raises(RuntimeError, match=rf"layerprune: .*{message}"):
        call()
