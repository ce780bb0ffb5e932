"""Everything that trains or generates runs on any one device, and gives there what it gives on a CPU.

Without a GPU the device is `tests.pretend`'s: it computes as a CPU does, and refuses to mix devices as
a GPU does. `pytest --device cuda` runs the same on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flown
from flown.base.seeding import seeded
from flown.context import BackboneConfig, CAMLConfig, FeatureSet, train_caml
from flown.context.pretrain import MetaBaselineConfig, train_backbone
from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.encoders.functional import FunctionalConfig
from flown.flow import VelocityConfig
from flown.generator.adapt import AdaptConfig, adapt
from flown.generator.config import FlownConfig
from flown.heads.frames import class_tokens
from flown.heads.maml import MAMLConfig, train_maml
from flown.heads.meta import fit_heads
from flown.heads.probe import probe
from flown.measure.evaluate import evaluate
from flown.measure.finetune import FinetuneConfig, finetune
from flown.tasks import ManyClass, draw_support
from flown.tasks import load as load_data
from flown.training import TrainConfig, train
from flown.zoo import Recipe
from tests import examples
from tests.pretend import DEVICE
from tests.test_backbone import many
from tests.test_meta import quick, tasks

FEW = TrainConfig(steps=4, batch_size=8, warmup=1, ema=0.5, validate_every=2, checkpoint_every=2)
CAML = CAMLConfig(ways=5, feature_dim=16, label_dim=8, layers=1, heads=2, mlp=16)


@pytest.fixture(autouse=True)
def _global_generator_is_left_alone(device: str) -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"


@pytest.fixture
def pretended(device: str) -> bool:
    """Whether the device draws a CPU's random numbers, so that results can be compared."""
    return torch.device(device) == DEVICE


def same(found: Tensor, expected: Tensor, comparable: bool) -> bool:
    """Up to sums in another order, which Adam makes larger where gradients are nearly zero."""
    found = found.detach().cpu()
    if not found.isfinite().all():
        return False
    alike = torch.isclose(found, expected, atol=2e-3).double()
    return not comparable or float(alike.mean()) > 0.98


def on(module: nn.Module, device: str) -> bool:
    wanted = torch.device(device)
    return {x.device for x in module.state_dict().values()} == {wanted}


def config(**changes: object) -> FlownConfig:
    values = {
        "encoder": VAEConfig(side=8, width=8, multipliers=(1, 2)),
        "encoder_training": FEW,
        "velocity": VelocityConfig(channels=8, blocks=1),
        "flow_training": FEW,
        "path_training": FEW,
        "context": ContextConfig(draws=2),
    }
    return FlownConfig.parse(values | changes)


# ---- the pretended device itself


def test_mixed_devices_are_errors(device: str) -> None:
    with seeded(0):
        line = nn.Linear(2, 2)
    here, there = torch.ones(2, 2), torch.ones(2, 2).to(device)
    assert there.device == torch.device(device) and (there + 1).cpu().device.type == "cpu"
    for mix in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here[there[0].long()],
        lambda: line(there),
        lambda: there.numpy(),
        lambda: torch.rand(2, generator=torch.Generator(), device=device),
        lambda: torch.vmap(lambda x: x @ here)(there),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mix()
    assert torch.equal((there * torch.tensor(2.0))[torch.tensor([0])].cpu(), 2 * here[:1])


def test_moving_a_module_does_not_share_memory(device: str) -> None:
    with seeded(0):
        line = nn.Linear(2, 2)
    kept = line.weight.data
    line.to(device)
    line.weight.data.add_(1)
    assert not torch.equal(line.weight.cpu(), kept)


# ---- the loop


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 1))

    def forward(self, generator: torch.Generator) -> Tensor:
        x = torch.randn(8, 3, generator=generator, device=self.weight.device)
        return (x @ self.weight - 1).square().mean()


def test_one_process_trains_on_two_devices_in_turn(
    device: str, pretended: bool, tmp_path: Path
) -> None:
    first, there, last = Line(), Line(), Line()
    train(first, FEW, out=tmp_path / "a", name="line")
    train(there, FEW, out=tmp_path / "b", name="line", device=device)
    train(last, FEW, out=tmp_path / "c", name="line")
    assert on(there, device) and on(last, "cpu")
    assert torch.equal(first.weight, last.weight)
    assert same(there.weight, first.weight, pretended)


def test_a_run_goes_on_on_another_device(device: str, tmp_path: Path) -> None:
    whole, half, rest = Line(), Line(), Line()
    train(whole, FEW, out=tmp_path / "a", name="line", device=device)
    short = FEW.model_copy(update={"steps": 2, "schedule": "constant"})
    long = FEW.model_copy(update={"schedule": "constant"})
    train(whole, long, out=tmp_path / "a", name="line", device=device)
    train(half, short, out=tmp_path / "b", name="line")
    train(rest, long, out=tmp_path / "b", name="line", resume=True, device=device)
    assert on(rest, device) and bool(rest.weight.isfinite().all())


# ---- a model


VARIANTS: dict[str, dict[str, object]] = {
    "context": {},
    "functional": {"functional": FunctionalConfig(kl=1.0)},
    "metric path": {
        "epochs": (8, 10),
        "flow": {"path": "metric"},
        "context": ContextConfig(mode="none"),
    },
    "init": {"flow": {"source": "kaiming-uniform"}},
    "diffusion": {"flow": {"process": "diffusion"}},
    "graph": {"encoder": {"kind": "graph"}},
    "chunked": {"encoder": {"kind": "chunked"}},
    "pdiff": {"encoder": {"kind": "pdiff"}},
    "linear": {"encoder": {"kind": "linear"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_fitted_and_generates(
    zoo: flown.Zoo, device: str, pretended: bool, variant: str, tmp_path: Path
) -> None:
    settings = config(**VARIANTS[variant])
    expected = flown.Flown.fit(zoo, settings, out=tmp_path / "cpu")
    model = flown.Flown.fit(zoo, settings, out=tmp_path / "there", device=device)
    assert on(model, device)
    for key, value in expected.state_dict().items():
        assert same(model.state_dict()[key], value, pretended), key
    images = load_data("digits")
    some = draw_support(images.train, 10, 5, torch.Generator().manual_seed(0))
    support = (some.images, some.labels) if model.support is not None else ()
    solver = "ddim" if variant == "diffusion" else "euler"
    made = model.generate(*support, n=3, steps=2, solver=solver)
    assert made.vectors.device == torch.device(device)
    wanted = expected.generate(*support, n=3, steps=2, solver=solver)
    assert same(made.vectors, wanted.vectors, pretended)
    ready = made.calibrated(images.train.images)
    accuracies = evaluate(ready, images.test.images, images.test.labels)
    assert accuracies.device == torch.device(device)
    again = model.reconstruct(zoo.select(epochs=(-1,)).batch("digits")[:2])
    assert again.vectors.device == torch.device(device)


@pytest.mark.parametrize("changes", [{}, {"method": "adjoint"}, {"parts": ("flow", "head")}])
def test_a_model_is_adapted(
    model: flown.Flown, device: str, changes: dict[str, object], tmp_path: Path
) -> None:
    training = FEW.model_copy(update={"choose": "val"})
    settings = AdaptConfig.parse(
        {"networks": 2, "steps": 2, "validated": 2, "training": training} | changes
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = adapt(
        model, examples.images("turned"), settings, out=tmp_path / "run", layout=0, device=device
    )
    assert on(new, device) and on(model, "cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    done = adapt(
        model,
        examples.images("turned"),
        settings,
        out=tmp_path / "run",
        layout=0,
        device=device,
        resume=True,
    )
    assert on(done, device) and done.history == new.history
    assert flown.Flown.from_pretrained(tmp_path / "run" / "model").tasks == new.tasks


# ---- networks


def test_networks_are_fine_tuned(device: str, tmp_path: Path) -> None:
    batch, images = examples.networks(2), examples.images("turned")
    settings = FinetuneConfig(epochs=2, batch_size=16)
    result = finetune(batch, images, settings, out=tmp_path / "n.safetensors", device=device)
    assert result.networks.vectors.device.type == "cpu"
    assert len(result.points) == 3 and result.networks.vectors.isfinite().all()


@pytest.mark.parametrize("subset", [None, "*.bn2.*"])
def test_a_zoo_is_trained(device: str, subset: str | None, tmp_path: Path) -> None:
    recipe = Recipe(
        name="few",
        dataset="digits",
        batch_size=32,
        epochs=2,
        max_train_images=64,
        keep=(2,),
        base_epochs=0 if subset is None else 1,
        **({} if subset is None else {"net": "resnet20", "subset": subset}),
    )
    zoo = flown.train_zoo(recipe, 2, tmp_path / "zoo", device=device)
    assert len(zoo) == 2
    zoo.verify()


# ---- support sets and few-shot


def points(set_: ManyClass) -> FeatureSet:
    flat = set_.images.float().flatten(1)[:, ::192] / 255
    return FeatureSet(flat, set_.labels, set_.class_split)


TRAININGS: dict[str, Callable[..., nn.Module]] = {
    "caml": lambda **how: train_caml([points(many())], CAML, FEW, **how),
    "maml": lambda **how: train_maml([points(many())], MAMLConfig(features=16), FEW, **how),
    "backbone": lambda **how: train_backbone(
        many(),
        MetaBaselineConfig(
            backbone=BackboneConfig(kind="resnet12", widths=(4, 6, 8, 10)),
            classification=FEW,
            episodes=FEW,
            tasks=1,
            bfloat16=False,
        ),
        **how,
    )[0],
    "heads": lambda **how: fit_heads(
        probe(tasks(20).support, 4),
        class_tokens(tasks(20)),
        quick(encoder_training=FEW, flow_training=FEW),
        **how,
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_parts_are_trained(name: str, device: str, pretended: bool, tmp_path: Path) -> None:
    made = TRAININGS[name](out=tmp_path / "there", device=device)
    expected = TRAININGS[name](out=tmp_path / "cpu")
    assert on(made, device)
    for key, value in expected.state_dict().items():
        assert same(made.state_dict()[key], value, pretended), key


def test_generated_heads_are_of_the_models_device(device: str, tmp_path: Path) -> None:
    model = TRAININGS["heads"](out=tmp_path, device=device)
    heads = model.generate(class_tokens(tasks(3)), 2, steps=2)
    assert heads.device == torch.device(device) and heads.shape[:2] == (3, 2)
