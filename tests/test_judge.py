"""The judge: which section is measured, and what follows from the measurements."""

import copy

import pytest
import torch

from layerprune import PruneConfig
from layerprune.judge import Judge

PENALTY = 0.05
OPEN = ["open"] * 4


def _judge(**config):
    return Judge(4, PruneConfig(**config), recheck=10)


def _feed(judge, mean, count=1, variance=1e-6):
    for _ in range(count):
        judge.test.add(judge.current, mean, variance, 64)


def test_a_section_that_theta_says_nothing_about_is_not_eliminated():
    """While learning one near 0 is measured first, one well below 1/2 but not near 0 not at all."""
    theta = torch.tensor([0.3, 0.4, 0.0, 0.2])
    assert _judge().choose(0, theta, OPEN, True) == 2
    assert _judge().choose(0, theta[[0, 1, 3, 3]], OPEN, True) is None


def test_one_at_a_time():
    """The choice stands until there is a verdict."""
    judge = _judge()
    first = judge.choose(0, torch.tensor([0.0, 0.0, 1.0, 0.5]), OPEN, True)
    for step in range(1, 4):
        assert judge.choose(step, torch.tensor([1.0, 0.0, 0.0, 0.0]), OPEN, True) == first
    _feed(judge, 0.0, 2)
    assert judge.verdict(3, PENALTY, True).useless
    assert judge.current is None


def test_sections_take_turns():
    judge = _judge()
    chosen = []
    for step in range(4):
        chosen.append(judge.choose(step, torch.zeros(4), OPEN, True))
        _feed(judge, -1.0, 2)
        assert not judge.verdict(step, PENALTY, True).useless
    assert sorted(chosen) == [0, 1, 2, 3]


@pytest.mark.parametrize("learning", [True, False])
def test_what_is_decided_is_not_chosen(learning):
    judge = _judge()
    status = ["eliminated", "open", "eliminated", "eliminated"]
    assert judge.choose(0, torch.zeros(4), status, learning) == 1
    judge = _judge()
    assert judge.choose(0, torch.zeros(4), ["eliminated"] * 4, learning) is None


def test_a_settled_section_is_looked_at_ever_more_rarely():
    judge = _judge()
    status = ["settled"] * 4
    for index in (1, 2, 3):
        judge.due[index] = 10**9
    gaps, step = [], 0
    for _ in range(4):
        judge.settle(0, step)
        start = step
        while judge.choose(step, torch.ones(4), status, True) is None:
            step += 1
        gaps.append(step - start)
        _feed(judge, -1.0, 2)
        judge.verdict(step, PENALTY, True)
    assert all(later >= 2 * earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert judge.choose(10**8, torch.ones(4), status, False) is None


def test_without_a_measurement_there_is_no_verdict():
    for learning in (True, False):
        judge = _judge()
        judge.choose(0, torch.zeros(4), OPEN, learning)
        assert judge.verdict(0, PENALTY, learning) is None


def test_a_measurement_that_can_tell_nothing_is_put_off():
    """No verdict, the section is released, and another time comes for it."""
    judge = _judge()
    index = judge.choose(0, torch.tensor([0.0, 0.5, 0.5, 0.5]), OPEN[:1] + ["eliminated"] * 3, True)
    _feed(judge, 0.0, 2, variance=1e4)
    assert judge.verdict(0, PENALTY, True) is None
    assert judge.current is None and judge.test.batches(index) == 0
    status = ["open"] + ["eliminated"] * 3
    later = [judge.choose(step, torch.zeros(4), status, True) for step in range(1, 200)]
    assert later[0] is None and later[-1] == index


@pytest.mark.parametrize(
    "mean, useless", [(-0.049, True), (-0.051, False), (0.2, True), (-3.0, False)]
)
def test_rounding_takes_the_likelier_side(mean, useless):
    """On several batches, whatever their noise: Delta + nu above or below zero."""
    judge = _judge()
    judge.begin_rounding()
    judge.choose(0, torch.full((4,), 0.5), OPEN, False)
    verdict = None
    for count in range(1, 100):
        _feed(judge, mean, variance=10.0)
        verdict = judge.verdict(count, PENALTY, False)
        if verdict is not None:
            break
    assert verdict.useless is useless and verdict.batches == count >= 2
    assert verdict.difference == pytest.approx(mean)
    assert judge.current is None


def test_rounding_begins_afresh():
    judge = _judge()
    index = judge.choose(0, torch.zeros(4), OPEN, True)
    _feed(judge, 5.0)
    judge.begin_rounding()
    assert judge.current is None and judge.test.batches(index) == 0


def test_the_state_is_restored():
    judge = _judge()
    judge.choose(0, torch.zeros(4), OPEN, True)
    _feed(judge, 0.1, 3, variance=1e4)
    judge.settle(2, 5)
    state = judge.state_dict()
    other = _judge()
    other.load_state_dict(copy.deepcopy(state))
    assert other.state_dict() == state
    assert other.choose(1, torch.ones(4), OPEN, True) == judge.current
