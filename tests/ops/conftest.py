"""An independent, slow implementation of the random stream and the draw, in Python integers."""

from types import SimpleNamespace

import numpy as np
import pytest

RESERVED = 0xFFFFFFFF


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
