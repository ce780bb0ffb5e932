"""Semi-discrete transport: equal shares, least cost, and a flow on it that few steps follow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import flown
from flown import training as loop
from flown.base.errors import FlownError
from flown.experiments.unconditional import share_encoder
from flown.flow import Gaussian, flow_matching_loss
from flown.flow.semidiscrete import SemiDiscrete
from flown.generator.config import FlowConfig, FlownConfig
from flown.tasks import draw_support, load

SHAPE = (2, 2, 2)


def transport(n: int = 12, groups: int = 3, seed: int = 0) -> SemiDiscrete:
    """Of networks of three groups, whose spread is not that of the noise."""
    x1 = 2 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 1
    of = torch.arange(n) % groups
    return SemiDiscrete(x1, of, torch.zeros_like(of), Gaussian(SHAPE), seed)


def noise(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_every_network_is_the_partner_of_as_much_noise() -> None:
    found = transport()
    for group in range(3):
        partners = found(noise(20_000), torch.full((20_000,), group))
        share = 4 * partners.bincount(minlength=12)[group::3] / 20_000
        assert len(partners.unique()) == 4 and (partners % 3 == group).all()
        assert share == pytest.approx(torch.ones(4), abs=0.06)


@pytest.mark.parametrize(("n", "spread"), [(300, 1.0), (40, 0.05)])
def test_shares_are_about_equal_of_many_networks_and_of_near_ones(n: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x1 = 3 + spread * torch.randn(n, 4, 4, 4, generator=generator)
    place = torch.zeros(n, dtype=torch.long)
    found = SemiDiscrete(x1, place, place, Gaussian((4, 4, 4)), 0)
    x0 = torch.randn(60_000, 4, 4, 4, generator=generator)
    share = found(x0, torch.zeros(60_000, dtype=torch.long)).bincount(minlength=n) * n / 60_000
    assert share.std() < 0.15 and share.min() > 0.5 and share.max() < 1.6


def test_it_costs_what_the_best_assignment_costs() -> None:
    """scipy's exact transport of 800 samples to 4 networks, each repeated 200 times."""
    found, x0 = transport(), noise(800).flatten(1)
    targets = found.x1[found.rows[0]]
    costs = torch.cdist(x0, targets).square().repeat_interleave(200, dim=1).double().numpy()
    rows, columns = linear_sum_assignment(costs)
    partners = found.x1[found(x0.view(-1, *SHAPE), torch.zeros(800, dtype=torch.long))]
    ours = (x0 - partners).square().sum(dim=1).mean()
    assert float(ours) == pytest.approx(costs[rows, columns].mean(), rel=0.03)


def test_no_exchange_of_partners_is_cheaper() -> None:
    """Paths of an optimal transport do not cross: (x_0 - x_0') (x_1 - x_1') >= 0, all pairs."""
    found, x0 = transport(), noise(300)
    x1 = found.x1[found(x0, torch.ones(300, dtype=torch.long))]
    x0 = x0.flatten(1)
    gains = (x0[:, None] - x0[None]) * (x1[:, None] - x1[None])
    assert gains.sum(dim=-1).min() > -1e-3


def test_partners_depend_on_the_seed_alone_and_not_on_the_batch() -> None:
    found, again = transport(), transport()
    x0, groups = noise(50), torch.arange(50) % 3
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert torch.equal(found(x0, groups), again(x0, groups))
    assert torch.equal(found(x0, groups)[order], found(x0[order], groups[order]))


def test_a_lone_network_is_everybodys_partner() -> None:
    found = transport(n=3)
    assert found(noise(9), torch.arange(9) % 3).tolist() == [0, 1, 2] * 3


def test_pseudo_huber_is_half_the_square_of_small_errors_and_the_norm_of_large_ones() -> None:
    x0, x1, t = noise(40), noise(40, 2), torch.rand(40)

    def loss(size: float, name: str) -> float:
        error = size * torch.ones(SHAPE)
        off = lambda x, t, c: x1 - x0 + error  # noqa: E731
        return float(flow_matching_loss(off, x0, x1, None, t, loss=name))  # type: ignore[arg-type]

    assert loss(1e-3, "squared") == pytest.approx(1e-6, rel=1e-3)
    assert loss(1e-2, "pseudo-huber") == pytest.approx(1e-4 / (2 * 0.125), rel=1e-2)
    assert loss(100, "pseudo-huber") == pytest.approx(100, rel=2e-3)


def test_a_mean_of_two_networks_does_not_minimise_pseudo_huber() -> None:
    """Of a point that leads to one network more often than to another, the loss learns the one."""
    x0 = torch.zeros(10, 1, 1, 1)
    x1 = torch.tensor([1.0] * 7 + [-1.0] * 3).view(-1, 1, 1, 1)
    grid = torch.linspace(-1, 1, 201)

    def best(name: str) -> float:
        losses = [
            flow_matching_loss(
                lambda x, t, c, v=v: v.expand_as(x), x0, x1, None, torch.zeros(10), loss=name
            )
            for v in grid
        ]
        return float(grid[int(torch.stack(losses).argmin())])

    assert best("squared") == pytest.approx(0.4, abs=0.011)
    assert best("pseudo-huber") > 0.85


@pytest.fixture(scope="module")
def straight(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path_factory: pytest.TempPathFactory
) -> flown.Flown:
    """The tiny model, its flow on semi-discrete pairs."""
    out = tmp_path_factory.mktemp("straight") / "run"
    share_encoder(run, out)
    how = FlowConfig(coupling="semi-discrete", loss="pseudo-huber", times="early", steps=4)
    return flown.Flown.fit(zoo, config.model_copy(update={"flow": how}), out=out, resume=True)


def test_four_steps_are_as_good_as_a_hundred(
    straight: flown.Flown, model: flown.Flown, zoo: flown.Zoo
) -> None:
    images = load("digits")
    some = draw_support(images.train, 10, 3, torch.Generator().manual_seed(0))

    def accuracy(of: flown.Flown, steps: int | None) -> float:
        batch = of.generate(some.images, some.labels, n=24, seed=3, steps=steps)
        return float(flown.evaluate(batch, images.val.images, images.val.labels).mean())

    assert accuracy(straight, None) > accuracy(straight, 100) - 5
    assert accuracy(straight, 1) > accuracy(model, 1)


def test_generation_takes_the_models_own_steps(straight: flown.Flown, tmp_path: Path) -> None:
    images = load("digits")
    some = draw_support(images.train, 10, 3, torch.Generator().manual_seed(0))
    straight.save_pretrained(tmp_path / "m")
    again = flown.Flown.from_pretrained(tmp_path / "m")
    assert again.sample(*some, n=2).nfe == 4 and again.sample(*some, n=2, steps=7).nfe == 7


def test_it_resumes_to_the_same_flow(
    run: Path, zoo: flown.Zoo, config: FlownConfig, straight: flown.Flown, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    share_encoder(run, out)
    how = straight.config.flow
    training = config.flow_training.model_copy(update={"checkpoint_every": 150})
    changes = {"flow": how, "flow_training": training}
    settings = config.model_copy(update=changes)

    class Killed(Exception):
        pass

    save = loop._Run.save

    def dies(self: loop._Run, path: Path, step: int) -> None:
        save(self, path, step)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Run, "save", dies)
        flown.Flown.fit(zoo, settings, out=out, resume=True)
    assert (out / "flow.checkpoint.safetensors").exists()
    resumed = flown.Flown.fit(zoo, settings, out=out, resume=True)
    for (name, mine), theirs in zip(
        resumed.velocity.state_dict().items(), straight.velocity.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_what_does_not_go_with_it_is_refused(
    zoo: flown.Zoo, config: FlownConfig, tmp_path: Path
) -> None:
    how = FlowConfig(coupling="semi-discrete")
    permuted = config.context.model_copy(update={"permute": True})
    changes = {"flow": how, "context": permuted}
    with pytest.raises(FlownError, match="coupling semi-discrete needs them all beforehand"):
        flown.Flown.fit(zoo, config.model_copy(update=changes), out=tmp_path / "a")
    with pytest.raises(
        FlownError, match="no choice of source, coupling, path, loss, times and sigma"
    ):
        FlownConfig.parse({"flow": {"process": "diffusion", "loss": "pseudo-huber"}})
    FlownConfig.parse({"flow": {"process": "diffusion", "steps": 1000}})
