"""The hyper-prior against numerical integration and minimisation; the penalties' contract."""

import math

import pytest
import torch

from layerprune import prior

GAMMAS = [1e-6, 0.01, 0.5, 0.999]
THETAS = torch.linspace(0, 1, 11, dtype=torch.float64)


def cost(pi: float, theta: float, gamma: float) -> float:
    """KL(Bernoulli(theta) || Bernoulli(pi)) - log p(pi | gamma), from the definitions."""
    kl = 0.0
    if theta > 0:
        kl += theta * math.log(theta / pi)
    if theta < 1:
        kl += (1 - theta) * math.log((1 - theta) / (1 - pi))
    return kl - math.log((gamma - 1) / math.log(gamma) / (1 + (gamma - 1) * (1 - pi)))


def minimise(theta: float, gamma: float) -> tuple[float, float]:
    """Minimiser and minimum of `cost` over pi = sigmoid(u), by repeated grids on u.

    The logit reaches optima near 0 as easily as those in the middle, and pi stays off 0 and 1,
    where the logarithms are infinite; both ends are approached to within exp(-35).
    """
    low, high = -35.0, 35.0
    for _ in range(12):
        grid = torch.linspace(low, high, 401, dtype=torch.float64).tolist()
        best = min(range(401), key=lambda i: cost(1 / (1 + math.exp(-grid[i])), theta, gamma))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 400)]
    pi = 1 / (1 + math.exp(-(low + high) / 2))
    return pi, cost(pi, theta, gamma)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_density_integrates_to_one(gamma: float) -> None:
    # With pi = gamma (e^v - 1) / (1 - gamma) the integrand is smooth however small gamma is.
    v = torch.linspace(0, math.log(1 / gamma), 20001, dtype=torch.float64)
    jacobian = gamma * v.exp() / (1 - gamma)
    pi = gamma * torch.expm1(v) / (1 - gamma)
    assert pi[-1].item() == pytest.approx(1.0, rel=1e-9)
    mass = torch.trapezoid(prior.log_density(pi, gamma).exp() * jacobian, v)
    assert mass.item() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_optimum_agrees_with_numerical_minimisation(gamma: float) -> None:
    for theta in THETAS.tolist():
        pi, value = minimise(theta, gamma)
        at = torch.tensor(theta, dtype=torch.float64)
        # A minimiser is known to the root of the precision of its minimum: 1e-10 at the smallest
        # gamma, where the density as it is defined cancels.
        assert prior.optimal_pi(at, gamma).item() == pytest.approx(pi, rel=1e-4, abs=1e-12)
        assert prior.flattened_value(at, gamma).item() == pytest.approx(value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_value_is_linear_with_slope_log_one_over_gamma(gamma: float) -> None:
    value = prior.flattened_value(THETAS, gamma)
    chord = value[0] + THETAS * (value[-1] - value[0])
    torch.testing.assert_close(value, chord, rtol=0, atol=1e-13)
    assert (value[-1] - value[0]).item() == pytest.approx(math.log(1 / gamma), rel=1e-12)
    theta = THETAS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(prior.flattened_value(theta, gamma).sum(), theta)
    assert slope.tolist() == [-math.log(gamma)] * len(THETAS)


def test_gamma_inverts_the_penalty() -> None:
    found = prior.gamma(0.002, 1500)
    assert math.log(1 / found) / 1500 == pytest.approx(0.002, rel=1e-12)
    assert prior.gamma(0.02, 60000) == 0.0  # exp(-1200) is no double


@pytest.mark.parametrize("nu, n", [(0.0, 10), (-1.0, 10), (math.nan, 10), (math.inf, 10), (0.1, 0)])
def test_gamma_refuses(nu: float, n: int) -> None:
    with pytest.raises(ValueError, match="finite and above 0"):
        prior.gamma(nu, n)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0, -0.5, math.nan])
@pytest.mark.parametrize("function", [prior.log_density, prior.optimal_pi, prior.flattened_value])
def test_gamma_outside_the_unit_interval_is_refused(function, gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be in"):
        function(torch.tensor(0.5), gamma)


def test_penalties_are_shares_of_the_cost_with_mean_strength() -> None:
    found = prior.penalties(0.02, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.01, 0.02, 0.03], rel=1e-15)
    assert prior.penalties(0.02, torch.full((7,), 5.0)).tolist() == pytest.approx([0.02] * 7)


def test_penalties_do_not_depend_on_the_unit_of_cost() -> None:
    flops = torch.tensor([3_538_944, 4_718_592, 4_718_592])
    found = prior.penalties(0.01, flops)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, prior.penalties(0.01, flops.float() * 1e-6))


def test_penalties_of_costs_too_large_for_their_dtype_to_sum() -> None:
    costs = torch.tensor([40000.0, 60000.0], dtype=torch.float16)
    assert prior.penalties(0.5, costs).tolist() == pytest.approx([0.4, 0.6], rel=1e-3)


@pytest.mark.parametrize("strength", [0.0, -0.01, math.nan, math.inf])
def test_penalties_refuse_a_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be finite and above 0"):
        prior.penalties(strength, torch.ones(3))


@pytest.mark.parametrize(
    "costs, message",
    [
        ([1.0, -2.0], "got -2 for section 1"),
        ([1.0, 2.0, 0.0], "got 0 for section 2"),
        ([0.0, 0.0], "got 0 for section 0"),
        ([math.nan, 1.0], "got nan for section 0"),
        ([1.0, math.inf], "got inf for section 1"),
        ([], "one number for each section"),
        ([[1.0, 2.0]], r"shape \[1, 2\]"),
    ],
)
def test_penalties_refuse_costs(costs: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior.penalties(0.01, torch.tensor(costs))
