"""The judge: which section is measured, and what follows from the measurements."""

import copy

import pytest
import torch

from layerprune import PruneConfig
from layerprune.elimination import Measurement
from layerprune.judge import Event, Judge

PENALTY = 0.05
OPEN = ["open"] * 4


def _judge(recheck=16, **config):
    return Judge(torch.full((4,), PENALTY), PruneConfig(**config), recheck)


def _hear(judge, mean, count=1, variance=1e-6, step=0, learning=True):
    """The verdict on the last of `count` measurements; none may come before."""
    for left in reversed(range(count)):
        verdict = judge.hear(Measurement(mean, variance, 0.0, 64), step, learning)
        assert left == 0 or verdict is None
    return verdict


def _piloted(judge, step, theta, status):
    """The section chosen, its pilot heard where there is one."""
    index = judge.choose(step, theta, status, True)
    if judge.piloting:
        assert _hear(judge, 0.0, step=step) is None
        assert judge.choose(step, theta, status, True) == index
    return index


def test_a_section_that_theta_says_nothing_about_is_not_eliminated():
    """While learning one near 0 is measured first, one well below 1/2 but not near 0 not at all."""
    theta = torch.tensor([0.3, 0.4, 0.0, 0.2])
    assert _judge().choose(0, theta, OPEN, True) == 2
    assert _judge().choose(0, theta[[0, 1, 3, 3]], OPEN, True) is None


def test_one_at_a_time():
    """The choice stands until there is a verdict."""
    judge = _judge()
    first = _piloted(judge, 0, torch.tensor([0.0, 0.0, 1.0, 0.5]), OPEN)
    for step in range(1, 4):
        assert judge.choose(step, torch.tensor([1.0, 0.0, 0.0, 0.0]), OPEN, True) == first
    assert _hear(judge, 0.0, 2, step=3).useless
    assert judge.current is None


def test_sections_take_turns():
    judge = _judge()
    chosen = []
    for step in range(4):
        chosen.append(_piloted(judge, step, torch.zeros(4), OPEN))
        assert not _hear(judge, -1.0, 2, step=step).useless
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
        _piloted(judge, step, torch.ones(4), status)
        assert not _hear(judge, -1.0, 2, step=step).useless
    assert all(later >= 2 * earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert judge.choose(10**8, torch.ones(4), status, False) is None


# Pilots


@pytest.mark.parametrize("mean", [5.0, -5.0])
def test_an_attempt_does_not_contain_its_pilot(mean):
    """The batch that an attempt was begun for is no part of its evidence."""
    judge = _judge()
    index = judge.choose(0, torch.zeros(4), OPEN, True)
    assert judge.piloting
    assert _hear(judge, mean) is None
    assert judge.current == index and not judge.piloting
    assert judge.test.batches(index) == 0 and judge.test.evidence(index) is None
    verdict = _hear(judge, 0.25 * mean, 2)
    assert verdict.difference == 0.25 * mean and verdict.batches == 2


def test_a_second_attempt_contains_nothing_of_the_first():
    """What ended the first says that the second is worth it, and no more: no pilot is needed."""
    judge = _judge()
    status = ["open"] + ["eliminated"] * 3
    _piloted(judge, 0, torch.zeros(4), status)
    assert not _hear(judge, -1.0, 2).useless
    assert judge.choose(1, torch.zeros(4), status, True) == 0 and not judge.piloting
    verdict = _hear(judge, 0.5, 2, step=1)
    assert verdict.useless and verdict.difference == 0.5 and verdict.batches == 2


@pytest.mark.parametrize("mean", [0.0, -PENALTY, 1.0, -1.0])
def test_no_verdict_comes_from_pilots(mean):
    """However many of them, and whatever they say."""
    judge = _judge()
    theta, pilots = torch.zeros(4), 0
    for step in range(400):
        if judge.choose(step, theta, OPEN, True) is None:
            continue
        assert judge.piloting
        assert _hear(judge, mean, variance=1e4, step=step) is None
        assert judge.current is None
        assert [judge.test.batches(index) for index in range(4)] == [0] * 4
        pilots += 1
    assert pilots > 10
    assert judge.test.state_dict() == _judge().test.state_dict()


def test_a_measurement_that_can_tell_nothing_is_put_off():
    """No verdict, the section is released, and another time comes for it."""
    judge = _judge()
    status = ["open"] + ["eliminated"] * 3
    index = judge.choose(0, torch.tensor([0.0, 0.5, 0.5, 0.5]), status, True)
    assert _hear(judge, 0.0, variance=1e4) is None
    assert judge.current is None and judge.test.batches(index) == 0
    later = [judge.choose(step, torch.zeros(4), status, True) for step in range(1, 200)]
    assert later[0] is None and later[-1] == index


def test_pilots_are_rare():
    """While nothing can be told yet, at most one step in recheck / 8 is a pilot's."""
    judge, theta = _judge(recheck=80), torch.zeros(4)
    steps = []
    for step in range(1000):
        if judge.choose(step, theta, OPEN, True) is not None:
            steps.append(step)
            _hear(judge, 0.0, variance=1e4, step=step)
    assert min(b - a for a, b in zip(steps, steps[1:], strict=False)) >= 10
    # All four have their turn, each at most every half recheck.
    assert judge.turn[0] > 0 and max(judge.turn) - min(judge.turn) <= 1
    assert max(judge.turn) <= 1000 / 40 + 1


def test_a_section_that_pays_much_is_told_before_one_without_effect():
    """Rows too noisy for nu, not for a difference of 40 nu."""
    judge = _judge()
    index = judge.choose(0, torch.ones(4), OPEN, True)
    noise = PENALTY**2
    assert _hear(judge, 0.0, variance=16 * noise) is None and judge.current is None
    judge = _judge()
    assert judge.choose(0, torch.ones(4), OPEN, True) == index
    assert _hear(judge, -40 * PENALTY, variance=16 * noise) is None and judge.current == index
    assert not _hear(judge, -40 * PENALTY, 2, variance=16 * noise).useless


# Rounding


@pytest.mark.parametrize("learning", [True, False])
def test_one_batch_is_no_verdict(learning):
    judge = _judge()
    if learning:
        _piloted(judge, 0, torch.zeros(4), OPEN)
    else:
        judge.begin_rounding(4, 1000)
        judge.choose(0, torch.zeros(4), OPEN, False)
    assert _hear(judge, 1.0, learning=learning) is None
    assert judge.current is not None


@pytest.mark.parametrize(
    "mean, useless", [(-0.049, True), (-0.051, False), (0.2, True), (-3.0, False)]
)
def test_rounding_takes_the_likelier_side(mean, useless):
    """On several batches, whatever their noise: Delta + nu above or below zero."""
    judge = _judge()
    judge.begin_rounding(4, 1000)
    judge.choose(0, torch.full((4,), 0.5), OPEN, False)
    assert not judge.piloting
    verdict = None
    for count in range(1, 100):
        verdict = _hear(judge, mean, variance=10.0, step=count, learning=False)
        if verdict is not None:
            break
    assert verdict.useless is useless and verdict.batches == count >= 2
    assert verdict.difference == pytest.approx(mean)
    assert judge.current is None


@pytest.mark.parametrize("undecided, steps", [(4, 1000), (4, 40), (4, 9), (4, 8), (1, 2), (0, 10)])
def test_rounding_ends_within_half_of_the_steps(undecided, steps):
    judge = _judge()
    judge.begin_rounding(undecided, steps)
    status = ["open"] * undecided + ["eliminated"] * (4 - undecided)
    used = 0
    while (index := judge.choose(used, torch.full((4,), 0.5), status, False)) is not None:
        used += 1
        if _hear(judge, 0.0, variance=10.0, step=used, learning=False) is not None:
            status[index] = "eliminated"
    assert status == ["eliminated"] * 4
    assert used <= max(steps / 2, undecided)


@pytest.mark.parametrize("undecided, steps", [(4, 1000), (4, 40), (4, 24), (1, 4)])
def test_rounding_ends_within_half_of_the_steps_also_when_heard_late(undecided, steps):
    """Each measurement is heard in the step after the one that made it."""
    judge = _judge()
    judge.begin_rounding(undecided, steps)
    status = ["open"] * undecided + ["eliminated"] * (4 - undecided)
    used, awaited = 0, []
    while "open" in status:
        index = judge.choose(used, torch.full((4,), 0.5), status, False, len(awaited))
        if index is not None:
            awaited.append(index)
        used += 1
        if len(awaited) > 1 or (index is None and awaited):
            heard = awaited.pop(0)
            if _hear(judge, 0.0, variance=10.0, step=used, learning=False) is not None:
                status[heard] = "eliminated"
    assert used <= steps / 2 and not awaited


# What is on its way


@pytest.mark.parametrize("batches", range(1, 9))
def test_nothing_is_measured_while_a_look_is_awaited(batches):
    """A look of 2, 4 or 8 batches may decide; the batch behind it would be measured in vain."""
    judge = _judge()
    _piloted(judge, 0, torch.zeros(4), OPEN)
    for _ in range(batches - 1):
        judge.test.add(judge.current, Measurement(-PENALTY, 1.0, 0.0, 64))
    chosen = judge.choose(1, torch.zeros(4), OPEN, True, awaited=1)
    assert chosen == (None if batches in (2, 4, 8) else judge.current)
    assert judge.choose(1, torch.zeros(4), OPEN, True, awaited=0) == judge.current


def test_nothing_is_measured_while_a_pilot_is_awaited():
    judge = _judge()
    judge.choose(0, torch.zeros(4), OPEN, True)
    assert judge.piloting
    assert judge.choose(1, torch.zeros(4), OPEN, True, awaited=1) is None


@pytest.mark.parametrize("piloting", [True, False])
def test_rounding_begins_afresh(piloting):
    judge = _judge()
    index = judge.choose(0, torch.zeros(4), OPEN, True)
    if not piloting:
        _hear(judge, 5.0, 2)
        assert judge.test.batches(index) == 1
    judge.begin_rounding(4, 1000)
    assert judge.current is None and judge.test.batches(index) == 0
    assert judge.choose(1, torch.zeros(4), OPEN, False) is not None
    verdict = None
    while verdict is None:
        verdict = _hear(judge, -1.0, learning=False)
    assert verdict.difference == -1.0 and not verdict.useless


# State


@pytest.mark.parametrize("heard", range(4))
def test_the_state_is_restored(heard):
    """Ahead of the pilot, after it, and within an attempt."""
    judge = _judge()
    judge.choose(0, torch.zeros(4), OPEN, True)
    if heard:
        _hear(judge, -PENALTY, heard)
    judge.settle(2, 5)
    state = judge.state_dict()
    other = _judge()
    other.load_state_dict(copy.deepcopy(state))
    assert other.state_dict() == state
    assert other.choose(1, torch.ones(4), OPEN, True) == judge.current
    assert other.piloting is (heard == 0)
    assert _hear(other, 1.0) == _hear(judge, 1.0)
    assert other.state_dict() == judge.state_dict()


def test_a_judge_put_off_is_restored():
    judge = _judge(recheck=80)
    judge.choose(3, torch.zeros(4), OPEN, True)
    _hear(judge, 0.0, variance=1e4, step=3)
    other = _judge(recheck=80)
    other.load_state_dict(copy.deepcopy(judge.state_dict()))
    chosen = [
        [which.choose(step, torch.zeros(4), OPEN, True) for step in range(4, 20)]
        for which in (judge, other)
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0][0] is None and chosen[0][-1] is not None


def test_an_event_reads_as_a_sentence():
    event = Event(7, "a", "eliminated", "test", -0.0012, 0.0003, 8, 0.01, 0.0)
    assert str(event) == "step 7: a eliminated by test, worth +0.0012 ± 0.0003 (needed: 0.0100)"
    without = Event(9, "a", "rounded-on", "rounding", None, None, 0, 0.01, 0.6)
    assert str(without) == "step 9: a rounded on"
