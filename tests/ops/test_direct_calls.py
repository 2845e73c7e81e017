"""Operators called past the public functions: the compiled kernels refuse what would harm."""

import pytest
import torch

LIBRARY = torch.ops.layerprune
X, GATE = torch.zeros(4, 3), torch.ones(4)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows(*values):
    return torch.tensor(values, dtype=torch.int64)


SLOT = ints(0, -1, 1, -1)


def residual(x=X, branch=X[:2], gate=GATE, slot=SLOT, relu=False, lerp=False):
    return LIBRARY.gated_residual(x, branch, gate, slot, None, relu, lerp)


def backward(grad=X, y=None, gate=GATE, slot=SLOT, factor=None, asked=None, branch_rows=2):
    return LIBRARY.gated_residual_backward(grad, y, gate, slot, factor, asked, branch_rows, False)


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
        (lambda: residual(slot=ints(0, 2, 1, -1)), r"slot\[1\] is 2, but .* has rows 0 to 1"),
        (lambda: residual(slot=ints(0, -2, 1, -1)), r"slot\[1\] is -2"),
        (lambda: residual(slot=ints(0, -1, 1, 0)), "slot has 0 twice, for rows 0 and 3"),
        (lambda: residual(slot=None), "without slot the branch must have 4 rows"),
        (lambda: residual(slot=rows(0, -1, 1, -1)), r"slot of shape \[4\] has a wrong dtype"),
        (lambda: residual(gate=GATE[:3]), r"gate of shape \[3\] has a wrong dtype or shape"),
        (lambda: residual(gate=GATE.double()), "gate of shape"),
        (lambda: residual(branch=X[:2].double()), r"branch of shape \[2, 3\] must have the dtype"),
        (lambda: residual(branch=torch.zeros(2, 4)), "does not have rows like those of"),
        (lambda: residual(branch=torch.zeros(2)), "branch of shape"),
        (lambda: residual(x=X.long(), branch=X[:2].long()), "must be float64, float32, float16"),
        (lambda: residual(relu=True, lerp=True), "lerp takes no activation"),
        (lambda: residual(x=torch.tensor(1.0)), "x must have at least one dimension"),
        (lambda: backward(slot=ints(0, -1, 3, -1)), r"slot\[2\] is 3"),
        (lambda: backward(y=torch.zeros(4, 4)), "y of shape"),
        (lambda: backward(branch_rows=-1), "branch_rows is -1"),
        (lambda: backward(slot=None, branch_rows=2), "branch_rows is 2 for 4 rows"),
        (lambda: backward(factor=X[:1]), "factor has 1 rows for 2 of the branch"),
        (lambda: backward(factor=X[:1], asked=rows(0, 2)), "factor has 1 rows for 2 gate_grad"),
        (lambda: backward(factor=X[:2], asked=rows(0, 4)), r"gate_grad_rows\[1\] is 4"),
        (lambda: backward(factor=X[:2], asked=rows(2, 2)), "gate_grad_rows has row 2 twice"),
        (lambda: backward(factor=X[:2].double()), "factor of shape"),
        (lambda: LIBRARY.gather_rows(X, rows(0, 4)), r"rows\[1\] is 4, but there are rows 0 to 3"),
        (lambda: LIBRARY.gather_rows(X, rows(-1)), r"rows\[0\] is -1"),
        (lambda: LIBRARY.gather_rows(X, rows(1, 1)), "rows has row 1 twice"),
        (lambda: LIBRARY.gather_rows(X, ints(1)), "rows of shape"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0, 4), X[:2]), r"rows\[1\] is 4"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0), X[:2]), "source has 2 rows for 1"),
        (lambda: LIBRARY.scatter_add_rows_(X.clone(), rows(0), X[:1].half()), "source of shape"),
        (lambda: LIBRARY.scatter_add_rows_(torch.zeros(3, 4).t(), rows(0), X[:1]), "out must be"),
        (lambda: LIBRARY.gate_factor(X, X[:2], ints(0, 5, 1, -1), None, False), r"slot\[1\] is 5"),
        (lambda: LIBRARY.gate_factor(X, X, None, rows(9), True), r"gate_grad_rows\[0\] is 9"),
        (lambda: draw(theta=(0.5, 1.5)), r"theta\[1\] is 1.5, not in \[0, 1\]"),
        (lambda: draw(theta=(NAN, 0.5)), r"theta\[0\] is nan"),
        (lambda: draw(rate=(0.0, -1.0)), r"probe_rate\[1\] is -1"),
        (lambda: draw(rate=(0.0,)), "probe_rate of shape"),
        (lambda: draw(batch=-1), "a batch of -1 rows"),
        (lambda: draw(multiple=0), "multiples of 0"),
        (lambda: draw(state=(1, 2)), "rng_state of shape"),
        (lambda: draw(scheme="sobol"), "unknown scheme sobol"),
        (lambda: step(statistics=torch.zeros(4, 3)), "statistics of shape"),
        (lambda: step(slope=torch.zeros(3, 5)), "counted of shape"),
        (lambda: step(slope=torch.zeros(12)), "slope of shape"),
        (lambda: step(theta=torch.tensor(0.5).expand(3)), "theta is updated in place, but several"),
    ],
)  # fmt: skip
def test_refused(call, message, compiled):
    """A RuntimeError that names the argument and what was got."""
    with pytest.raises(RuntimeError, match=rf"layerprune: .*{message}"):
        call()


def test_meta_and_other_devices_are_not_served_by_the_kernels():
    """A tensor elsewhere takes the fake or the reference, whatever is compiled."""
    x = X.to("meta")
    y = LIBRARY.gated_residual(x, x, GATE.to("meta"), None, None, True, False)
    assert y.device.type == "meta" and y.shape == x.shape
