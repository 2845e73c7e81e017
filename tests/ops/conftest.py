"""What the operations are compared with: plain formulas, and a slow draw in Python integers.

With ``--device`` of another device than the CPU the same tests run there.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._device import DeviceContext, _device_constructors

from layerprune import ops

RESERVED = 0xFFFFFFFF


class ValuesOn(DeviceContext):
    """A default device whose random numbers are the CPU's.

    `torch.device` as a context has the device's own generator draw them, and refuses the CPU's.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return made
        return made.detach().to(self.device).requires_grad_(made.requires_grad)


def _values(config):
    """The context in which a test's values are made."""
    device = torch.device(config.getoption("device"))
    return nullcontext() if device.type == "cpu" else ValuesOn(device)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Modules and parameters hold values as well."""
    with _values(collector.config):
        return (yield)


@pytest.fixture(autouse=True, scope="module")
def values(request):
    """What a module's tests make lies on the device."""
    with _values(request.config):
        yield


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("cpu_only")
    if marker is not None and item.config.getoption("device") != "cpu":
        pytest.skip(f"for the CPU alone: {marker.args[0]}")


def philox(counter, key):
    """Philox4x32-10 as printed in the paper of Salmon et al., on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & RESERVED, (p0 >> 32) ^ c[3] ^ k[1], p0 & RESERVED]
        k = [(k[0] + 0x9E3779B9) & RESERVED, (k[1] + 0xBB67AE85) & RESERVED]
    return c


def words(seed, draw, section, row):
    """The four words of one (section, row)."""
    counter = (draw & RESERVED, (draw >> 32) & RESERVED, section, row)
    return philox(counter, (seed & RESERVED, (seed >> 32) & RESERVED))


def uniform(word):
    """Upper 24 bits as a float32 in [0, 1)."""
    return np.float32(word >> 8) * np.float32(2.0**-24)


def draw(theta, batch, rng_state, probe_rate, min_rows, row_multiple, scheme):
    """One section after the other, one row after the other; lists of Python and NumPy numbers."""
    seed, number, first = rng_state
    result = []
    for section, (on_rate, rate) in enumerate(zip(theta, probe_rate, strict=True)):
        row_words = [words(seed, number, section, first + b) for b in range(batch)]
        gates = np.zeros(batch, np.float32)
        if scheme == "systematic":
            reserved = words(seed, number, section, RESERVED)
            count = int(np.floor(float(rate) * batch + float(uniform(reserved[1]))))
            count = min(count, batch)
            by_word1 = sorted(range(batch), key=lambda b: (row_words[b][1], b))
            probes = by_word1[:count]
            for j, b in enumerate(probes):
                t = (np.float32(j) + uniform(row_words[b][2])) / np.float32(count)
                gates[b] = min(max(t, np.float32(2.0**-25)), np.float32(1 - 2.0**-24))
            others = sorted(set(range(batch)) - set(probes), key=lambda b: (row_words[b][0], b))
            on = int(np.floor(float(on_rate) * len(others) + float(uniform(reserved[0]))))
            for b in others[: min(on, len(others))]:
                gates[b] = 1
        else:
            probes = []
            for b, w in enumerate(row_words):
                if uniform(w[1]) < rate:
                    probes.append(b)
                    gates[b] = max(uniform(w[2]), np.float32(2.0**-25))
                elif uniform(w[3]) < on_rate:
                    gates[b] = 1
        running = {b for b in range(batch) if gates[b] > 0}
        padding = sorted(set(range(batch)) - running, key=lambda b: (row_words[b][0], b))
        while padding and (len(running) < min_rows or len(running) % row_multiple):
            running.add(padding.pop(0))
        result.append((gates, sorted(running), sorted(probes)))
    return result


@pytest.fixture(scope="session")
def plain():
    """The plain implementation: ``philox``, ``words``, ``uniform`` and ``draw``."""
    return SimpleNamespace(philox=philox, words=words, uniform=uniform, draw=draw)


def spread(branch, slot, batch):
    """The branch's rows where the rows of x read them, zeros elsewhere; and which rows read one."""
    if slot is None:
        return branch, torch.ones(batch, dtype=torch.bool)
    has = slot >= 0
    full = branch.new_zeros((batch, *branch.shape[1:]))
    full[has] = branch[slot[has].long()]
    return full, has


def weights(gate, like, has):
    """The gates in the dtype of ``like``, shaped to multiply its rows; 0 without a slot."""
    return torch.where(has, gate, 0).to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def gated_sum(x, branch, gate, slot=None, form="add", activation=None):
    """The gated residual sum, in the dtype of x."""
    full, has = spread(branch, slot, x.shape[0])
    y = x + weights(gate, x, has) * (full - x if form == "lerp" else full)
    return y.relu() if activation == "relu" else y


def gated_gradients(grad, y, x, branch, gate, slot=None, form="add", activation=None, asked=None):
    """Its gradients by hand, in the dtype of x: of x, of the branch and of the gate.

    ``y`` is the sum as it was computed: where it is 0 decides what ReLU lets through.
    """
    full, has = spread(branch, slot, x.shape[0])
    weight = weights(gate, x, has)
    passed = torch.where(y > 0, grad, 0) if activation == "relu" else grad
    d_x = passed * (1 - weight) if form == "lerp" else passed
    d_full = passed * weight
    d_branch = torch.zeros_like(branch)
    if slot is None:
        d_branch += d_full
    else:
        d_branch[slot[has].long()] = d_full[has]
    d_gate = passed * (full - x if form == "lerp" else full)
    if x.dim() > 1:
        d_gate = d_gate.flatten(1).sum(1)
    wanted = has.clone()
    if asked is not None:
        wanted[:] = False
        wanted[asked] = has[asked]
    return d_x, d_branch, torch.where(wanted, d_gate, 0)


def close(found, exact, eager=None):
    """Asserts an error of at most twice that of the same formula in the same dtype, plus a little.

    The rule of FlashAttention's tests. With ``eager`` None, of the exact result rounded once.
    """
    assert found.shape == exact.shape
    if found.numel() == 0:
        return
    eager = exact.to(found.dtype) if eager is None else eager
    # In float64 the formula itself has a few roundings, of which this sees no error.
    room = 8 * exact.abs().max() if found.dtype == torch.float64 else 1 / 4
    bound = 2 * (eager.double() - exact).abs().max() + room * torch.finfo(found.dtype).eps
    error = (found.double() - exact).abs().max()
    assert error <= bound, f"error {error} above {bound}"


@pytest.fixture(scope="session")
def gated():
    """The plain gated residual sum: ``sum``, ``gradients``; ``close`` compares with it."""
    return SimpleNamespace(sum=gated_sum, gradients=gated_gradients, close=close)


@pytest.fixture
def poison():
    """Within the test torch fills uninitialised memory: NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def device(request):
    """Where the test's values are."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def kernels(device):
    """The name of the kernels that serve the device; skips the test where eager PyTorch does."""
    name = ops.backends()[device.type].name
    if name == "eager":
        pytest.skip("no kernels are in use")
    return name


@pytest.fixture
def compiled(kernels):
    """Skips the test unless the compiled kernels serve the device."""
    if kernels != "compiled":
        pytest.skip("the compiled part is not in use")
