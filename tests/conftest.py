"""Fixtures: one tiny real zoo and model, trained once a session on scikit-learn's digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flown
from flown.flow import VelocityConfig
from flown.generator.fit import ContextConfig, FlownConfig
from flown.training import TrainConfig
from flown.zoo import Recipe


@pytest.fixture(autouse=True)
def _no_outside_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tests see only data that dependencies ship, whatever this machine holds."""
    monkeypatch.delenv("FLOWN_DATA", raising=False)
    monkeypatch.setenv("FLOWN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


for name in ("tests.fakes:ConvNorm", "tests.fakes:wide_conv_norm", "tests.test_graph:norm_mlp"):
    flown.trust(name)
DIGITS = Recipe(
    name="tiny", dataset="digits", learning_rate=5e-3, batch_size=32, epochs=10, keep=(8, 10)
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


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
