"""Configs survive a round trip through plain values; another `kind` drops the old one's keys."""

from __future__ import annotations

import importlib
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import flown
from flown.base.config import Config
from flown.base.errors import FlownError
from flown.encoders import ENCODERS, GraphConfig, VAEConfig
from flown.generator.config import FlownConfig
from flown.heads.meta import HeadFlowConfig
from flown.nets.architecture import Architecture
from flown.weights.layout import WeightLayout
from tests.examples import layout


def subclasses(kind: type[Config]) -> Iterator[type[Config]]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


for module in pkgutil.walk_packages(flown.__path__, "flown."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
CONFIGS = sorted(
    {kind for kind in subclasses(Config) if kind.__module__.startswith("flown.")},
    key=lambda kind: kind.__qualname__,
)


def example(annotation: Any) -> Any:
    """A value of a field's type; of a config, one whose required fields have values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return tuple(example(a) for a in arguments if a is not Ellipsis)
    if origin is dict:
        return {"key": example(arguments[1])}
    if issubclass(annotation, Config):
        if annotation is Architecture:
            return layout().architecture
        if annotation is WeightLayout:
            return layout()
        fields = annotation.model_fields.items()
        return annotation(**{k: example(f.annotation) for k, f in fields if f.is_required()})
    return {str: "digits", int: 2, float: 0.5, bool: True}[annotation]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__qualname__)
def test_a_config_is_what_its_values_say(kind: type[Config]) -> None:
    config = example(kind)
    assert kind.parse(config.model_dump(mode="json")) == config
    assert config.override([]) == config


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_chosen_by_its_kind(name: str) -> None:
    expected = ENCODERS[name][0]()
    for before, union in ((FlownConfig(), "encoder"), (HeadFlowConfig(), "encoder")):
        for old in ENCODERS:
            config = before.override([f"encoder={{kind: {old}}}"])
            after = config.override([f"{union}.kind={name}"])
            assert after.encoder == expected, (old, name)


def test_a_new_kind_drops_the_old_ones_keys_and_keeps_the_new_ones() -> None:
    config = FlownConfig(encoder=VAEConfig(side=32, beta=1e-3))
    for order in (1, -1):
        found = config.override(["encoder.kind=graph", "encoder.node=8"][::order])
        assert found.encoder == GraphConfig(node=8)
    assert config.override(["encoder.kind=vae"]) == config, "the same kind drops nothing"
    with pytest.raises(FlownError, match="unknown key 'side'"):
        config.override(["encoder.kind=graph", "encoder.side=8"])
    with pytest.raises(FlownError, match="gaph"):
        config.override(["encoder.kind=gaph"])
