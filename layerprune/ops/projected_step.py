"""Operation 4: one projected SGD step of every keep probability, in one call.

The estimator's reduction, its running statistics, the competition between sections and the
projection are small functions of ``[L]`` tensors. They are written once, here; nothing above
repeats them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerprune.ops.checks import check, check_device, check_vector
from layerprune.ops.schema import call_in_place, register

STATISTICS = 5
"""Rows of ``statistics``: steps, rows, rows under squared weights, mean, sum of squared deviations.

All are sums that decay with every step that brings evidence; ``rows`` weighs a step by the rows it
counted.
"""


def row_variance(statistics: Tensor) -> Tensor:
    """Variance of one row's slope about its section's mean, from the spread between steps.

    Args:
        statistics: float32 ``[5, L]`` as kept by `projected_gate_step_`.

    Returns:
        float32 ``[L]``; zero where fewer than two steps brought evidence.
    """
    steps, rows, squares, _, deviations = statistics
    freedom = steps - squares / rows.clamp_min(1e-12)
    return torch.where(freedom > 1e-3, deviations / freedom.clamp_min(1e-3), 0)


def standard_error(statistics: Tensor) -> Tensor:
    """Standard error of the running mean, float32 ``[L]``; infinite before the second step."""
    steps, rows, squares, _, _ = statistics
    error = (row_variance(statistics) * squares).sqrt() / rows.clamp_min(1e-12)
    return torch.where(steps > 1, error, torch.inf)


def reference(
    theta: Tensor,
    statistics: Tensor,
    in_play: Tensor,
    slope: Tensor,
    counted: Tensor,
    penalty: Tensor,
    free: Tensor,
    horizon: float,
    noise_factor: float,
    decay: float,
    confidence: float,
    max_descending: int,
) -> None:
    """The specification of ``projected_gate_step_``; see there. ``max_descending`` -1 is None."""
    rows = counted.sum(1)
    seen = rows > 0
    estimate = torch.where(counted, slope, 0).sum(1) / rows.clamp_min(1)

    # West's update of a weighted mean and variance; a section without evidence keeps its own.
    steps, weight, squares, mean, deviations = statistics
    new_weight = decay * weight + rows
    before = estimate - mean
    new_mean = mean + before * rows / new_weight.clamp_min(1e-12)
    updated = torch.stack(
        (
            decay * steps + 1,
            new_weight,
            decay * decay * squares + rows,
            new_mean,
            decay * deviations + rows * before * (estimate - new_mean),
        )
    )
    statistics.copy_(torch.where(seen, updated, statistics))

    # A useless section (slope 0) goes from 1 to 0 in `horizon` steps, or in as many as keep the
    # random walk's share of that way small.
    variance = row_variance(statistics) / rows.clamp_min(1)
    duration = (noise_factor * variance / penalty.square()).clamp_min(horizon)
    moved = (theta - (estimate + penalty) / (penalty * duration)).clamp_(0, 1)

    excess = statistics[3] + penalty
    if max_descending < 0:
        in_play.copy_(free)
        allowed = free
    else:
        # Those already falling stay in play while they should fall; free places go to the largest
        # excess, of equal ones to the first.
        falling = free & (statistics[0] > 0) & (excess > 0)
        order = torch.where(falling, excess, -torch.inf).argsort(descending=True, stable=True)
        playing = (in_play & falling)[order].int()
        best = order[playing.argsort(descending=True, stable=True)][:max_descending]
        in_play.zero_().index_fill_(0, best, True).logical_and_(falling)
        # Letting the others rise on noise would ratchet useless sections up.
        rising = free & (excess + confidence * standard_error(statistics) < 0)
        allowed = in_play | rising
    theta.copy_(torch.where(allowed & seen, moved, theta))


def _fake(*_: object) -> None:
    return None


_op = register(
    "projected_gate_step_(Tensor(a!) theta, Tensor(b!) statistics, Tensor(c!) in_play, "
    "Tensor slope, Tensor counted, Tensor penalty, Tensor free, float horizon, "
    "float noise_factor, float decay, float confidence, int max_descending) -> ()",
    reference,
    _fake,
)


def projected_gate_step_(
    theta: Tensor,
    statistics: Tensor,
    in_play: Tensor,
    slope: Tensor,
    counted: Tensor,
    penalty: Tensor,
    free: Tensor,
    *,
    horizon: float,
    noise_factor: float,
    decay: float,
    confidence: float,
    max_descending: int | None,
) -> None:
    """Moves every keep probability by one projected SGD step, in place.

    For a section l with evidence in this step, g_l = mean of ``slope`` over its counted rows, and
    ``theta_l <- clip(theta_l - (g_l + nu_l) / (nu_l h_l), 0, 1)`` with
    ``h_l = max(horizon, noise_factor * var_l / nu_l**2)``, var_l the variance of g_l.
    At most ``max_descending`` sections (largest running mean of g + nu) are in play; another
    section moves only when the upper confidence bound of its g + nu is below zero.

    Args:
        theta: float32 ``[L]`` in [0, 1], updated in place.
        statistics: float32 ``[5, L]`` running statistics (zeros at the start), updated in place.
        in_play: bool ``[L]``, the sections that may fall, updated in place.
        slope: float32 ``[L, R]``, each row's derivative of *its own* loss with respect to its gate;
            finite where it counts, for what is not stays in the statistics.
        counted: bool ``[L, R]``, the rows that are evidence (probes, for the path estimator).
        penalty: float32 ``[L]``, nu, positive.
        free: bool ``[L]``, the sections whose theta may move at all.
        horizon: steps in which a useless section falls from 1 to 0, at least 1.
        noise_factor: bound c on the random walk's share of the way; 0 turns it off.
        decay: factor of the running statistics per step, in (0, 1].
        confidence: width of the upper confidence bound in standard errors.
        max_descending: how many sections may fall at one time; ``None`` for plain projected SGD.

    Raises:
        ValueError: if a dtype, shape or device is wrong or a number is out of its range.
        RuntimeError: compiled, if a penalty is not positive, or what is updated shares memory with
            itself or another argument.
    """
    check_vector("theta", theta, torch.float32)
    sections = theta.shape[0]
    if slope.dim() != 2:
        raise ValueError(f"slope must be [{sections}, rows], got shape {list(slope.shape)}")
    rows = slope.shape[1]
    for name, tensor, dtype, shape in (
        ("statistics", statistics, torch.float32, (STATISTICS, sections)),
        ("in_play", in_play, torch.bool, (sections,)),
        ("slope", slope, torch.float32, (sections, rows)),
        ("counted", counted, torch.bool, (sections, rows)),
        ("penalty", penalty, torch.float32, (sections,)),
        ("free", free, torch.bool, (sections,)),
    ):
        check(name, tensor, dtype, shape)
        check_device(name, tensor, theta.device)
    if not (horizon >= 1 and noise_factor >= 0 and 0 < decay <= 1 and confidence >= 0):
        raise ValueError(
            "horizon must be >= 1, noise_factor >= 0, decay in (0, 1] and confidence >= 0, got "
            f"{horizon}, {noise_factor}, {decay} and {confidence}"
        )
    if max_descending is not None and not (isinstance(max_descending, int) and max_descending >= 1):
        raise ValueError(
            f"max_descending must be a whole number of at least 1, or None, got {max_descending}"
        )
    call_in_place(
        _op,
        (theta, statistics, in_play),
        theta,
        statistics,
        in_play,
        slope,
        counted,
        penalty,
        free,
        float(horizon),
        float(noise_factor),
        float(decay),
        float(confidence),
        -1 if max_descending is None else max_descending,
    )
