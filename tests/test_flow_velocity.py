"""The velocity network: gradients, conditioning, binding, guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.flow import UNet, VelocityConfig, flow_matching_loss, guided, integrate

MODES = ["embed", "concat"]
SHAPE = (4, 4, 4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(shape: tuple[int, ...] = SHAPE, **values: Any) -> UNet:
    """A small float64 network whose parameters are all away from zero, as after training."""
    config = VelocityConfig.parse({"channels": 8, "blocks": 1, "embed_dim": 16} | values)
    unet = UNet(config, shape, 12).double()
    with torch.no_grad():
        for parameter in unet.parameters():
            noise = torch.randn(parameter.shape, generator=seeded(parameter.numel()))
            parameter.add_(0.1 * noise)
    return unet


def inputs(n: int = 6, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(n)
    shapes = ((n, *shape), (n,), (n, 12))
    x, t, context = (torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes)
    return 2 * x - 1, t, 2 * context - 1


@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("conditional", [True, False])
def test_every_parameter_receives_a_gradient(conditioning: str, conditional: bool) -> None:
    unet = net(conditioning=conditioning, context_dropout=0.5)
    x, t, context = inputs(16)
    loss = flow_matching_loss(
        unet, x, x.flip(0), context if conditional else None, t=t, generator=seeded()
    )
    loss.backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_without_dropout_no_parameter_is_left_out_of_the_graph() -> None:
    unet = net()
    x, _, context = inputs()
    flow_matching_loss(unet, x, x, context, generator=seeded()).backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 8, 8), (1, 12, 12)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 1, 2)])
def test_shapes(conditioning: str, shape: tuple[int, ...], multipliers: tuple[int, ...]) -> None:
    unet = net(shape, conditioning=conditioning, multipliers=multipliers, attention=False)
    x, t, context = inputs(3, shape)
    assert unet(x, t, context).shape == x.shape
    assert unet(x, t).shape == x.shape


def test_starts_at_zero_velocity() -> None:
    x, t, context = inputs()
    assert not UNet(VelocityConfig(channels=8), SHAPE, 12).double()(x, t, context).any()


@pytest.mark.parametrize("conditioning", MODES)
def test_eval_is_deterministic_and_rows_do_not_mix(conditioning: str) -> None:
    unet = net(conditioning=conditioning, context_dropout=0.5).eval()
    x, t, context = inputs()
    once = unet(x, t, context)
    assert torch.equal(once, unet(x, t, context))
    alone = unet(x[2:3], t[2:3], context[2:3])
    torch.testing.assert_close(once[2:3], alone)


@pytest.mark.parametrize("conditioning", MODES)
def test_time_and_context_matter(conditioning: str) -> None:
    unet = net(conditioning=conditioning)
    x, t, context = inputs()
    v = unet(x, t, context)
    assert (unet(x, 1 - t, context) - v).abs().max() > 1e-4
    assert (unet(x, t, context.flip(0)) - v).abs().max() > 1e-4


@pytest.mark.parametrize("conditioning", MODES)
def test_bind_equals_forward(conditioning: str) -> None:
    unet = net(conditioning=conditioning)
    x, _, context = inputs()
    t = torch.tensor(0.3).double()
    full = t.expand(len(x))
    for given in (context, None):
        bound = unet.bind(given)(x, t)
        torch.testing.assert_close(bound, unet(x, full, given))
    one = unet.bind(context[:1])(x, t)
    rows = context[:1].expand(len(x), -1)
    torch.testing.assert_close(one, unet(x, full, rows))


@pytest.mark.parametrize("conditioning", MODES)
def test_dropped_rows_see_the_null_context(conditioning: str) -> None:
    unet = net(conditioning=conditioning)
    x, t, context = inputs()
    drop = torch.arange(len(x)) % 2 == 0
    v = unet(x, t, context, drop)
    torch.testing.assert_close(v[drop], unet(x, t)[drop])
    torch.testing.assert_close(v[~drop], unet(x, t, context)[~drop])


@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("rows", [1, 6])
def test_guidance(conditioning: str, rows: int) -> None:
    unet = net(conditioning=conditioning)
    x, _, context = inputs()
    context, t = context[:rows], torch.tensor(0.6).double()
    own, null = unet.bind(context)(x, t), unet.bind(None)(x, t)
    assert torch.equal(guided(unet, context, 1.0)(x, t), own)
    for scale in (0.0, 1.000001, 2.5):
        expected = null + scale * (own - null)
        found = guided(unet, context, scale)(x, t)
        torch.testing.assert_close(found, expected)


def test_guidance_costs_two_evaluations_a_call() -> None:
    unet, (x, _, context) = net(), inputs()
    with torch.no_grad():
        plain = integrate(guided(unet, context, 1.0), x, "heun", steps=3)
        doubled = integrate(guided(unet, context, 2.0), x, "heun", steps=3)
    assert (plain.nfe, doubled.nfe) == (6, 12)


@pytest.mark.parametrize("conditioning", MODES)
def test_recompute_through_the_network_changes_no_gradient(conditioning: str) -> None:
    """Of the network and of a head that computes its context."""
    unet, (x, _, context) = net(conditioning=conditioning), inputs()
    head = nn.Sequential(nn.Linear(context.shape[1], 8), nn.Tanh(), nn.Linear(8, context.shape[1]))
    head.double()
    parameters = [*unet.parameters(), *head.parameters()]
    gradients = []
    for recompute in (False, True):
        for p in parameters:
            p.grad = None
        bound = unet.bind(head(context))
        end = integrate(bound, x, "heun", steps=3, t0=0.4, recompute=recompute).x
        end.square().mean().backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    for direct, again in zip(*gradients, strict=True):
        torch.testing.assert_close(direct, again, rtol=1e-9, atol=1e-14)


def test_learns_two_points_told_apart_by_context() -> None:
    """From N(0, I) to one point for either context: the flow ends near the right one."""
    torch.manual_seed(0)
    unet = UNet(VelocityConfig(channels=16, blocks=1, multipliers=(1,)), (1, 2, 2), 2)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    generator = seeded()
    for _ in range(150):
        label = torch.randint(2, (32,), generator=generator)
        x1 = (2.0 * label - 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        x0 = torch.randn(x1.shape, generator=generator)
        context = torch.eye(2)[label]
        loss = flow_matching_loss(unet, x0, x1, context, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for label, point in ((0, -1.0), (1, 1.0)):
        x0 = torch.randn(16, 1, 2, 2, generator=generator)
        with torch.no_grad():
            end = integrate(unet.bind(torch.eye(2)[[label]]), x0, steps=20).x
        assert (end - point).abs().mean() < 0.25, label


@pytest.mark.parametrize(
    ("shape", "multipliers"), [((4, 6, 6), (1, 1, 2)), ((4, 16, 16), (1, 1, 1, 1)), (SHAPE, ())]
)
def test_impossible_levels_are_refused(
    shape: tuple[int, ...], multipliers: tuple[int, ...]
) -> None:
    with pytest.raises(FlownError, match="multipliers"):
        UNet(VelocityConfig(channels=8, multipliers=multipliers), shape, 12)


def test_wrong_shapes_are_named() -> None:
    unet, (x, t, context) = net(), inputs()
    with pytest.raises(FlownError, match=r"context: expected \(B, 12\), got \(6, 7\)"):
        unet(x, t, context[:, :7])
    with pytest.raises(FlownError, match=r"latent: expected \(B, 4, 4, 4\), got \(6, 4, 2, 4\)"):
        unet(x[:, :, :2], t, context)


def test_config_refuses_nonsense() -> None:
    assert issubclass(VelocityConfig, Config)
    for wrong in ({"context_dropout": 1.0}, {"channels": 0}, {"conditioning": "add"}):
        with pytest.raises(FlownError, match=next(iter(wrong))):
            VelocityConfig.parse(wrong)
