"""Fixtures: one tiny real zoo and model, trained once a session on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flown
from flown.context.tokens import ContextConfig
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.tasks import ManyClass, TaskDraw, load
from flown.training import TrainConfig
from flown.zoo import Recipe
from tests import examples
from tests.pretend import DEVICE, Pretend


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "where tests/test_devices.py runs; cpu: on a second device that is pretended"
    parser.addoption("--device", default="cpu", help=text)


@pytest.fixture(autouse=True)
def _no_outside_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tests see only data that dependencies ship, whatever this machine holds."""
    monkeypatch.delenv("FLOWN_DATA", raising=False)
    monkeypatch.setenv("FLOWN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


for name in (
    "tests.examples:ConvNorm",
    "tests.examples:wide_conv_norm",
    "tests.test_graph:norm_mlp",
):
    flown.trust(name)
DIGITS = Recipe(
    name="tiny", dataset="digits", learning_rate=5e-3, batch_size=32, epochs=10, keep=(8, 10)
)

RANDOM = Recipe(
    name="turned",
    dataset="glyphs",
    learning_rate=5e-3,
    batch_size=20,
    epochs=4,
    keep=(4,),
    tasks=TaskDraw(ways=3, rotations=(0, 90), held_out=0.3),
)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> flown.Zoo:
    """Twelve `cnn-small` on digits: ten to train on, two held out."""
    return flown.train_zoo(DIGITS, 12, tmp_path_factory.mktemp("zoo") / "digits")


@pytest.fixture(scope="session")
def config() -> FlownConfig:
    return FlownConfig(
        encoder_training=TrainConfig(steps=250, batch_size=16, validate_every=250),
        velocity=VelocityConfig(channels=16, blocks=1),
        flow_training=TrainConfig(steps=300, batch_size=32),
        context=ContextConfig(draws=4),
    )


@pytest.fixture(scope="session")
def run(zoo: flown.Zoo, config: FlownConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished fit on the tiny zoo."""
    out = tmp_path_factory.mktemp("run") / "digits"
    flown.Flown.fit(zoo, config, out=out)
    return out


@pytest.fixture(scope="session")
def model(run: Path) -> flown.Flown:
    return flown.Flown.from_pretrained(run / "model")


@pytest.fixture(scope="session")
def three_tasks(tmp_path_factory: pytest.TempPathFactory) -> flown.Zoo:
    """Untrained networks for digits, turned and parity, the last of two classes alone."""
    return examples.make_zoo(tmp_path_factory.mktemp("three") / "zoo")


@pytest.fixture(scope="session")
def model_of_three(three_tasks: flown.Zoo, tmp_path_factory: pytest.TempPathFactory) -> flown.Flown:
    """A model of three tasks with different numbers of classes, fitted in seconds."""
    brief = FlownConfig(
        encoder_training=TrainConfig(steps=60, batch_size=16),
        velocity=VelocityConfig(channels=16, blocks=1),
        flow_training=TrainConfig(steps=60, batch_size=32),
        context=ContextConfig(draws=4),
    )
    images = {task: examples.images(task) for task in examples.TASKS}
    out = tmp_path_factory.mktemp("three-run") / "run"
    return flown.Flown.fit(three_tasks, brief, out=out, images=images)


@pytest.fixture(scope="session")
def glyphs() -> ManyClass:
    """Digits as a set of many classes: eight to draw tasks from, two apart."""
    whole = load("digits").train
    rows = torch.cat([(whole.labels == k).nonzero().flatten()[:60] for k in range(10)])
    return ManyClass(
        name="glyphs",
        classes=tuple(f"digit {k}" for k in range(10)),
        images=whole.images[rows],
        labels=whole.labels[rows],
        class_split={"train": torch.arange(8), "val": torch.tensor([8]), "test": torch.tensor([9])},
    )


@pytest.fixture(scope="session")
def random_tasks(glyphs: ManyClass, tmp_path_factory: pytest.TempPathFactory) -> flown.Zoo:
    """Networks of 24 random three-way tasks, about a third of them held out."""
    return flown.train_zoo(RANDOM, 24, tmp_path_factory.mktemp("random") / "zoo", images=glyphs)


@pytest.fixture(scope="session")
def model_of_random_tasks(
    random_tasks: flown.Zoo, glyphs: ManyClass, tmp_path_factory: pytest.TempPathFactory
) -> flown.Flown:
    """A model of random tasks, fitted in seconds."""
    brief = FlownConfig(
        encoder_training=TrainConfig(steps=40, batch_size=16, validate_every=40),
        velocity=VelocityConfig(channels=16, blocks=1),
        flow_training=TrainConfig(steps=40, batch_size=16),
        context=ContextConfig(tokens="centroid", shots=3, permute=True),
    )
    out = tmp_path_factory.mktemp("random-run") / "run"
    return flown.Flown.fit(random_tasks, brief, out=out, images={"glyphs": glyphs})


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of `--device`, or a pretended one, where mixed devices are errors as on a GPU."""
    name = str(request.config.getoption("--device"))
    if name != "cpu":
        yield name
        return
    with Pretend():
        yield str(DEVICE)
