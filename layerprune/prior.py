"""The flattening hyper-prior on a gate's prior, and the penalties it amounts to.

A gate has a Bernoulli prior of parameter ``pi`` and a Bernoulli posterior of parameter ``theta``.
Under the hyper-prior ``p(pi | gamma)`` below, the best ``pi`` leaves a cost that is linear in
``theta`` with slope ``log(1 / gamma)``. Derivation: `docs/algorithm.md`, section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gamma(nu: float, n: int) -> float:
    """The hyper-prior's parameter that gives a penalty of ``nu`` on a mean over ``n`` examples.

    Inverts ``nu = log(1 / gamma) / n``.

    Args:
        nu: penalty in units of the mean loss, > 0.
        n: number of training examples, > 0.

    Returns:
        A number in (0, 1); 0.0 where ``nu * n`` is above 745 and ``exp`` underflows.

    Raises:
        ValueError: if an argument is not finite and positive.
    """
    for name, value in (("nu", nu), ("n", n)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    return math.exp(-nu * n)


def log_density(pi: Tensor, gamma: float) -> Tensor:
    """Log density of the flattening hyper-prior.

    ``p(pi | gamma) = ((gamma - 1) / log gamma) / (1 + (gamma - 1) (1 - pi))``.

    Args:
        pi: floating tensor of any shape, values in [0, 1].
        gamma: in (0, 1).

    Returns:
        Tensor like ``pi``.

    Raises:
        ValueError: if ``gamma`` is outside (0, 1).
    """
    return _log_constant(gamma) - torch.log(gamma + (1 - gamma) * pi)


def optimal_pi(theta: Tensor, gamma: float) -> Tensor:
    """The ``pi`` that minimises ``KL(Bernoulli(theta) || Bernoulli(pi)) - log p(pi | gamma)``.

    Args:
        theta: floating tensor of any shape, values in [0, 1].
        gamma: in (0, 1).

    Returns:
        ``gamma theta / (1 - theta + gamma theta)``, like ``theta``.

    Raises:
        ValueError: if ``gamma`` is outside (0, 1).
    """
    _check_gamma(gamma)
    return gamma * theta / (1 - theta + gamma * theta)


def flattened_value(theta: Tensor, gamma: float) -> Tensor:
    """The minimum over ``pi`` of ``KL(Bernoulli(theta) || Bernoulli(pi)) - log p(pi | gamma)``.

    Args:
        theta: floating tensor of any shape, values in [0, 1].
        gamma: in (0, 1).

    Returns:
        A linear function of ``theta`` with slope ``log(1 / gamma)``, in nats, like ``theta``.

    Raises:
        ValueError: if ``gamma`` is outside (0, 1).
    """
    return -_log_constant(gamma) + (1 - theta) * math.log(gamma)


def penalties(strength: float, costs: Tensor) -> Tensor:
    """What keeping each section costs, in units of the loss.

    ``nu_l = strength cost_l / mean(cost)``. A kept section is one whose removal would raise the
    loss by more than its ``nu_l``. A section that costs nothing has no penalty, and no step length.

    Args:
        strength: mean of the penalties, finite and > 0.
        costs: ``[L]``, any real dtype and unit; finite and > 0.

    Returns:
        ``[L]`` on the device of ``costs``; its dtype, or PyTorch's default one for integers.

    Raises:
        ValueError: if ``strength`` or ``costs`` is not as above.
    """
    if not (math.isfinite(strength) and strength > 0):
        raise ValueError(
            f"strength must be finite and above 0, got {strength!r}: it is the rise of the loss "
            "at which a section of average cost is still removed; 0.01 is a common start"
        )
    if costs.ndim != 1 or costs.numel() == 0:
        raise ValueError(
            f"costs must hold one number for each section, got shape {list(costs.shape)}"
        )
    values = costs.to(torch.float64)
    wrong = ~(torch.isfinite(values) & (values > 0))
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"costs must be finite and above 0, got {values[index]:g} for section {index}: leave "
            "that section out, or choose a cost that every section has, such as 'uniform'"
        )
    dtype = costs.dtype if costs.is_floating_point() else torch.get_default_dtype()
    return (strength * values / values.mean()).to(dtype)


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma < 1:
        raise ValueError(
            f"gamma must be in (0, 1), got {gamma!r}: at 1 a section costs nothing, above 1 "
            "keeping it is rewarded"
        )


def _log_constant(gamma: float) -> float:
    """Log of ``(gamma - 1) / log gamma``, which normalises the density."""
    _check_gamma(gamma)
    return math.log((gamma - 1) / math.log(gamma))
