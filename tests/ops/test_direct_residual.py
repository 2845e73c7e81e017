"""Wrong arguments of operators 2 and 3, called directly.

The compiled part raises a RuntimeError that names the argument, and touches nothing out of bounds.
"""

import pytest
import torch

LIBRARY = torch.ops.layerprune
X, BRANCH, GATE = torch.ones(4, 3), torch.ones(2, 3), torch.full((4,), 0.5)
SLOT = torch.tensor([0, -1, 1, -1], dtype=torch.int32)

pytestmark = pytest.mark.usefixtures("compiled")


def value(*case):
    """A case that its values make wrong: those of another device nobody reads."""
    return pytest.param(*case, marks=pytest.mark.cpu_only("values are checked there"))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


def refused(operator, change, message, **arguments):
    """Calls with some arguments changed, and expects the error."""
    assert set(change) <= set(arguments)
    with pytest.raises(RuntimeError, match=message):
        operator(*(arguments | change).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value({"slot": int32(0, -1, 2**31 - 1, -1)}, r"slot\[2\] is 2147483647"),
        value({"slot": int32(0, -(2**31), 1, -1)}, r"slot\[1\] is -2147483648"),
        ({"slot": SLOT[:3]}, r"\bslot\b.*\[3\]"),
        ({"slot": SLOT[None]}, r"\bslot\b.*\[1, 4\]"),
        ({"branch": BRANCH.half()}, r"\bbranch\b"),
        ({"branch": torch.ones(2, 3, 1)}, r"\bbranch\b.*\[2, 3, 1\]"),
        ({"branch": torch.ones(())}, r"\bbranch\b"),
        ({"gate": GATE.half()}, r"\bgate\b"),
        ({"gate": GATE[:, None]}, r"\bgate\b.*\[4, 1\]"),
    ],
)
def test_gated_residual(change, message):
    """Slots at the ends of their type; shapes and dtypes of every argument."""
    tensors = {"x": X, "branch": BRANCH, "gate": GATE, "slot": SLOT}
    refused(
        LIBRARY.gated_residual,
        change,
        message,
        **tensors,
        gate_grad_rows=None,
        relu=False,
        lerp=False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(3, 3)}, r"\by\b.*\b3\b"),
        ({"y": torch.ones(5, 3)}, r"\by\b.*\b5\b"),
        ({"y": X.double()}, r"\by\b"),
        ({"y": X, "lerp": True}, "lerp takes no activation"),
        ({"factor": torch.ones(2, 4)}, r"\bfactor\b.*\[2, 4\]"),
        ({"factor": torch.ones(6)}, r"\bfactor\b.*\b6\b"),
        ({"factor": BRANCH.half(), "lerp": True}, r"\bfactor\b"),
        value({"gate_grad_rows": int64(0, -1)}, r"gate_grad_rows\[1\] is -1"),
        ({"gate_grad_rows": int32(0, 2)}, r"\bgate_grad_rows\b"),
        ({"gate_grad_rows": int64(0, 2)[None]}, r"\bgate_grad_rows\b.*\[1, 2\]"),
        value({"branch_rows": 1}, r"slot\[2\] is 1"),
        ({"branch_rows": 5, "slot": None}, r"branch.*\b5\b"),
        ({"gate": GATE[:3]}, r"\bgate\b.*\[3\]"),
        ({"grad": torch.ones(())}, "grad must have at least one dimension"),
        ({"grad": X.long(), "factor": None}, "float64, float32, float16 or bfloat16"),
    ],
)
def test_gated_residual_backward(change, message):
    """What was saved must fit the gradient in rows as well."""
    tensors = {"grad": X, "y": None, "gate": GATE, "slot": SLOT, "factor": BRANCH}
    refused(
        LIBRARY.gated_residual_backward,
        change,
        message,
        **tensors,
        gate_grad_rows=None,
        branch_rows=2,
        lerp=False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value({"slot": int32(0, -2, 1, -1)}, r"slot\[1\] is -2"),
        value({"slot": int32(0, -1, 1, 0)}, "slot has 0 twice"),
        ({"slot": SLOT.long()}, r"\bslot\b"),
        ({"slot": None}, "without slot"),
        ({"branch": BRANCH.double()}, r"\bbranch\b"),
        ({"branch": torch.ones(2, 4)}, r"\bbranch\b.*\[2, 4\]"),
        value({"gate_grad_rows": int64(2, 2)}, "gate_grad_rows has row 2 twice"),
        value({"gate_grad_rows": int64(2, -1)}, r"gate_grad_rows\[1\] is -1"),
        ({"gate_grad_rows": int32(2)}, r"\bgate_grad_rows\b"),
    ],
)
@pytest.mark.parametrize("lerp", [False, True])
def test_gate_factor(change, message, lerp):
    """The rows asked for, and what is read for them."""
    tensors = {"x": X, "branch": BRANCH, "slot": SLOT, "gate_grad_rows": int64(0, 2)}
    refused(LIBRARY.gate_factor, change, message, **tensors, lerp=lerp)


SAMPLED = [
    ({"theta": torch.tensor(0.5).double()}, r"\btheta\b"),
    ({"theta": torch.tensor([0.5])}, r"\btheta\b.*\[1\]"),
    ({"rng_state": int64(1, 2)}, r"\brng_state\b.*\[2\]"),
    ({"rng_state": torch.ones(3)}, r"\brng_state\b"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *SAMPLED,
        ({"branch": X[:3]}, "branch must have 4 rows, not 3"),
        ({"branch": torch.ones(4, 2)}, r"\bbranch\b.*\[4, 2\]"),
        ({"branch": X.double()}, r"\bbranch\b"),
        ({"relu": True, "lerp": True}, "lerp takes no activation"),
    ],
)
def test_sampled_gated_residual(change, message):
    """As `gated_residual`, with what the draw reads."""
    tensors = {"x": X, "branch": X, "theta": torch.tensor(0.5), "rng_state": int64(1, 2, 3)}
    refused(
        LIBRARY.sampled_gated_residual,
        change,
        message,
        **tensors,
        section=0,
        relu=False,
        lerp=False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *SAMPLED,
        ({"y": torch.ones(3, 3)}, r"\by\b.*\b3\b"),
        ({"y": torch.ones(4, 2)}, r"\by\b.*\[4, 2\]"),
        ({"y": X, "lerp": True}, "lerp takes no activation"),
    ],
)
def test_sampled_gated_residual_backward(change, message):
    """What was saved must fit the gradient in rows as well."""
    tensors = {"grad": X, "y": None, "theta": torch.tensor(0.5), "rng_state": int64(1, 2, 3)}
    refused(
        LIBRARY.sampled_gated_residual_backward, change, message, **tensors, section=0, lerp=False
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value({"rows": int64(0, 1 << 40)}, r"rows\[1\] is 1099511627776"),
        ({"rows": int64(0, 1)[None]}, r"\brows\b.*\[1, 2\]"),
        ({"x": torch.ones(())}, "x must have at least one dimension"),
    ],
)
def test_gather_rows(change, message):
    """Rows beyond 32 bits; lists that are no lists."""
    refused(LIBRARY.gather_rows, change, message, x=X, rows=int64(0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value({"rows": int64(0, -1)}, r"rows\[1\] is -1"),
        value({"rows": int64(2, 2)}, "rows has row 2 twice"),
        ({"rows": int32(0, 2)}, r"\brows\b"),
        ({"source": torch.ones(2, 4)}, r"\bsource\b.*\[2, 4\]"),
        ({"out": torch.ones(4, 6)[:, ::2]}, "out must be contiguous or channels_last"),
        # Every row is dense, but they lie apart, or upon each other.
        ({"out": torch.ones(8, 3)[::2]}, "out must be contiguous or channels_last"),
        ({"out": torch.ones(8, 3)[:1].expand(4, 3)}, "out must be contiguous or channels_last"),
    ],
)
def test_scatter_add_rows_(change, message):
    """What cannot be updated in place is refused and stays as it is."""
    refused(LIBRARY.scatter_add_rows_, change, message, out=X, rows=int64(0, 2), source=BRANCH)
    out = change.get("out", X)
    assert out.eq(1).all() and (out._base is None or out._base.eq(1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        value({"theta": torch.tensor([0.5, -0.5])}, r"theta\[1\] is -0.5"),
        value({"theta": torch.tensor([0.5, torch.inf])}, r"theta\[1\] is inf"),
        ({"theta": torch.tensor([0.5, 0.5]).double()}, r"\btheta\b"),
        ({"theta": torch.ones(1, 2)}, r"\btheta\b.*\[1, 2\]"),
        value({"probe_rate": torch.tensor([torch.nan, 0.0])}, r"probe_rate\[0\] is -?nan"),
        ({"rng_state": torch.ones(3)}, r"\brng_state\b"),
        ({"batch_size": 1 << 31}, "a batch of 2147483648 rows"),
    ],
)
def test_sample_gates(change, message):
    """Probabilities that are none; a batch that slots cannot number."""
    refused(
        LIBRARY.sample_gates,
        change,
        message,
        theta=torch.tensor([0.5, 0.5]),
        batch_size=4,
        rng_state=int64(1, 2, 3),
        probe_rate=torch.zeros(2),
        min_rows=1,
        row_multiple=1,
        scheme="systematic",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": torch.zeros(1, 3).expand(5, 3)}, "statistics is updated in place"),
        ({"statistics": torch.zeros(5, 1).expand(5, 3)}, "statistics is updated in place"),
        ({"in_play": torch.tensor(False).expand(3)}, "in_play is updated in place"),
        ({"in_play": torch.zeros(3)}, r"\bin_play\b"),
        ({"theta": torch.full((3,), 0.5).double()}, r"\btheta\b"),
        ({"slope": torch.zeros(3, 4).double()}, r"\bslope\b"),
        ({"counted": torch.ones(3, 4)}, r"\bcounted\b"),
        ({"penalty": torch.ones(2)}, r"\bpenalty\b.*\[2\]"),
        ({"free": torch.ones(3)}, r"\bfree\b"),
    ],
)
def test_projected_gate_step_(change, message):
    """A state that lies upon itself; shapes and dtypes of every argument."""
    arguments = {
        "theta": torch.full((3,), 0.5),
        "statistics": torch.zeros(5, 3),
        "in_play": torch.zeros(3, dtype=torch.bool),
        "slope": torch.zeros(3, 4),
        "counted": torch.ones(3, 4, dtype=torch.bool),
        "penalty": torch.ones(3),
        "free": torch.ones(3, dtype=torch.bool),
    }
    numbers = {"horizon": 10.0, "noise_factor": 0.0, "decay": 1.0, "confidence": 1.0}
    refused(LIBRARY.projected_gate_step_, change, message, **arguments, **numbers, max_descending=1)
