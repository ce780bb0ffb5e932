"""Solvers against closed forms, torchdiffeq and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from flown.base.errors import FlownError
from flown.flow import SOLVERS, integrate
from tests.problems import PROBLEMS, Problem, gaussian_to_gaussian

FIXED = [name for name, tableau in SOLVERS.items() if tableau is not None]
ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
X0 = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).reshape(2, 3)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("problem", PROBLEMS[:-1], ids=lambda problem: problem.name)
def test_order_of_convergence(problem: Problem, solver: str) -> None:
    # The last problem, the Gaussian flow, is left out: midpoint's leading error cancels there.
    exact = problem.exact(X0, 1.0)
    errors = [
        (integrate(problem.velocity, X0, solver, steps).x - exact).norm().item()
        for steps in (40, 80)
    ]
    assert errors[0] > 1e-13
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[solver], abs=0.25)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_dopri5_meets_its_tolerance(problem: Problem) -> None:
    found = integrate(problem.velocity, X0, "dopri5", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.x, problem.exact(X0, 1.0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("solver", "theirs"),
    [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), ("rk4", "rk4")],
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_agrees_with_torchdiffeq(problem: Problem, solver: str, theirs: str) -> None:
    found = integrate(problem.velocity, X0, solver, steps=7, trajectory=True)
    path = odeint(lambda t, x: problem.velocity(x, t), X0, found.times, method=theirs)
    assert found.path is not None
    torch.testing.assert_close(found.path, path, rtol=1e-13, atol=1e-13)


def test_heun_is_the_trapezoidal_predictor_corrector() -> None:
    h, x = 0.25, X0
    for _ in range(4):  # dx/dt = -x: one step is the second-order Taylor polynomial of exp(-h)
        x = x * (1 - h + h**2 / 2)
    torch.testing.assert_close(integrate(lambda x, t: -x, X0, "heun", 4).x, x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gaussian_flow_has_the_known_moments(solver: str) -> None:
    problem = gaussian_to_gaussian(3.0, 1.0, 0.25)
    x0 = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = integrate(problem.velocity, x0, solver, steps=200).x
    assert x.mean().item() == pytest.approx(3.0, abs=0.01)
    assert x.std().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("solver", SOLVERS)
def test_trajectory_and_direction(solver: str) -> None:
    problem = PROBLEMS[0]
    found = integrate(problem.velocity, X0, solver, 100, t0=0.2, t1=0.8, trajectory=True)
    assert found.path is not None
    assert found.path.shape == (101, 2, 3)
    assert found.times[[0, -1]].tolist() == pytest.approx([0.2, 0.8])
    torch.testing.assert_close(found.path[0], X0)
    torch.testing.assert_close(found.path[-1], found.x)
    torch.testing.assert_close(found.path[50], problem.exact(X0, 0.3), rtol=1e-2, atol=0)
    back = integrate(problem.velocity, found.x, solver, 100, t0=0.8, t1=0.2)
    torch.testing.assert_close(back.x, X0, rtol=1e-2, atol=0)
    assert back.path is None


@pytest.mark.parametrize("solver", SOLVERS)
def test_nfe_is_the_number_of_calls(solver: str) -> None:
    calls: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == ()
        assert t.dtype == x.dtype
        calls.append(t)
        return -x

    found = integrate(velocity, X0.float(), solver, steps=5)
    assert found.nfe == len(calls)
    if solver in STAGES:
        assert found.nfe == 5 * STAGES[solver]


class Net(nn.Module):
    """A small non-linear velocity in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight[:, :3] + t * self.weight[:, 3])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("solver", FIXED)
def test_gradient_is_that_of_finite_differences(solver: str, recompute: bool) -> None:
    net = Net()

    def end(x0: Tensor, weight: Tensor) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return torch.func.functional_call(net, {"weight": weight}, (x, t))

        return integrate(velocity, x0, solver, steps=3, recompute=recompute).x

    x0 = X0.clone().requires_grad_()
    assert torch.autograd.gradcheck(end, (x0, net.weight))


@pytest.mark.parametrize("solver", FIXED)
def test_recompute_changes_neither_gradient_nor_nfe(solver: str) -> None:
    gradients, counts = [], []
    for recompute in (False, True):
        net = Net()
        found = integrate(net, X0, solver, steps=4, recompute=recompute)
        found.x.square().sum().backward()
        assert net.weight.grad is not None
        gradients.append(net.weight.grad)
        counts.append(found.nfe)
    assert torch.equal(*gradients)
    assert counts[0] == counts[1]


def test_dopri5_is_differentiable() -> None:
    net = Net()
    integrate(net, X0, "dopri5").x.sum().backward()
    assert net.weight.grad is not None
    fine = Net()
    integrate(fine, X0, "rk4", steps=50).x.sum().backward()
    torch.testing.assert_close(net.weight.grad, fine.weight.grad, rtol=1e-3, atol=1e-4)


def test_unknown_solver_names_the_nearest() -> None:
    with pytest.raises(FlownError, match=r"unknown solver 'eulr'.*'euler'.*dopri5"):
        integrate(lambda x, t: x, X0, "eulr")


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_below_one_are_refused(steps: int) -> None:
    with pytest.raises(FlownError, match=f"at least one, got {steps}"):
        integrate(lambda x, t: x, X0, steps=steps)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_is_reported(solver: str, bad: float) -> None:
    with pytest.raises(FlownError, match=rf"{solver}, steps \d+.*diverged"):
        integrate(lambda x, t: x * bad, X0, solver, steps=3)


def test_recompute_needs_a_grid() -> None:
    with pytest.raises(FlownError, match="dopri5"):
        integrate(lambda x, t: x, X0, "dopri5", recompute=True)


def test_recompute_keeps_no_graph() -> None:
    """One node an evaluation and one to take the step, however much the velocity computes."""
    net = Net()

    def deep(x: Tensor, t: Tensor) -> Tensor:
        for _ in range(20):
            x = net(x, t)
        return x

    def nodes(value: Tensor) -> int:
        seen, waiting = set(), [value.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [after for after, _ in node.next_functions]
        return len(seen)

    kept = [nodes(integrate(deep, X0, steps=steps, recompute=True).x) for steps in (5, 10)]
    assert kept[1] - kept[0] == 2 * 5


def test_recompute_refuses_to_lose_a_gradient() -> None:
    early, late = Net(), Net()
    x = integrate(lambda x, t: (early if t < 0.5 else late)(x, t), X0, steps=2, recompute=True).x
    with pytest.raises(FlownError, match="same parameters at all times"):
        x.sum().backward()
