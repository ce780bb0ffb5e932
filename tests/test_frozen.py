"""Frozen modules as files: the round trip, what is refused, and the numbers of the shipped files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import load_tensors, save_tensors
from flown.base.frozen import load_frozen, save_frozen
from flown.context import SupportEncoder
from flown.heads.features import Standardised, load_backbone
from flown.heads.meta import HeadFlow, flow_heads


class _Sizes(Config):
    inputs: int
    outputs: int = 2


def load(path: Path) -> nn.Linear:
    return load_frozen(
        path, "sizes", "layer", _Sizes, lambda sizes, _: nn.Linear(sizes.inputs, sizes.outputs)
    )


@pytest.fixture
def layer(tmp_path: Path, generator: torch.Generator) -> Path:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(2, 3, generator=generator))
    save_frozen(linear, tmp_path / "layer.safetensors", "sizes", _Sizes(inputs=3), {"by": "hand"})
    return tmp_path / "layer.safetensors"


def test_a_loaded_module_is_frozen_and_saves_to_the_same_bits(layer: Path) -> None:
    state = torch.get_rng_state()
    loaded = load(layer)
    assert torch.equal(torch.get_rng_state(), state), "loading draws from the global generator"
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.weight.dtype == torch.float32
    again = layer.with_name("again.safetensors")
    save_frozen(loaded, again, "sizes", _Sizes(inputs=3), {"by": "hand"})
    (first, header), (second, same_header) = load_tensors(layer), load_tensors(again)
    assert header == same_header and header["by"] == "hand"
    assert first.keys() == second.keys() and first["weight"].dtype == torch.float16
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "no layer, its header has no 'sizes'"),
        ({"sizes": "{"}, "no layer, 'sizes' of its header: no valid JSON"),
        ({"sizes": "3"}, "sizes: expected keys and values, got int"),
        ({"sizes": '{"input": 3}'}, "unknown key 'input'. Did you mean 'inputs'"),
        ({"sizes": '{"inputs": "many"}'}, r"inputs: .*valid integer"),
        ({"sizes": '{"inputs": 4}'}, r"tensor 'weight' is \(2, 3\), expected \(2, 4\)"),
    ],
)
def test_other_files_are_refused_by_name(layer: Path, header: dict[str, str], message: str) -> None:
    save_tensors(layer, load_tensors(layer)[0], header)
    with pytest.raises(FlownError, match=rf"layer\.safetensors.*{message}"):
        load(layer)


def test_a_generator_of_heads_needs_its_number_of_features(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    HeadFlow.pretrained().save(path)
    tensors, header = load_tensors(path)
    for features in ({}, {"features": "x"}):
        save_tensors(path, tensors, {"heads": header["heads"], **features})
        with pytest.raises(FlownError, match=r"heads\.safetensors: no generator of heads"):
            HeadFlow.load(path)


@pytest.mark.parametrize("kind", [SupportEncoder, Standardised, HeadFlow])
def test_each_kind_refuses_the_others_files(
    kind: type[SupportEncoder | Standardised | HeadFlow], layer: Path
) -> None:
    with pytest.raises(FlownError, match=r"layer\.safetensors: no .* header has no"):
        kind.load(layer)


# ---- what ships


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (10, 3, 40, 40), generator=generator, dtype=torch.uint8)


LABELS = torch.arange(5).repeat(2)

ENCODER = [
    [1.19372, -0.52664, 1.35886],
    [1.10105, -0.72829, 1.44422],
    [1.10369, -0.57842, 1.30846],
    [1.21046, -0.60471, 1.40468],
    [0.9545, -0.5993, 1.22151],
]
FEATURES = [
    [-0.20891, 0.38775, 0.93653],
    [-0.10277, -0.13695, 0.98815],
    [-0.52828, -0.09307, 1.59026],
]
BIASES = [-0.10817, -0.25549, -0.30658, -0.01171, 0.04873]


def test_the_shipped_support_encoder_gives_its_numbers(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = SupportEncoder.pretrained().encode(images, LABELS, 5, generator)
    expected = torch.tensor(ENCODER)
    torch.testing.assert_close(outputs[:, :3], expected, atol=1e-4, rtol=1e-3)


def test_the_shipped_backbone_and_heads_give_their_numbers(images: Tensor) -> None:
    features = load_backbone("resnet12-small")(images)
    torch.testing.assert_close(features[:3, :3], torch.tensor(FEATURES), atol=1e-4, rtol=1e-3)
    heads = flow_heads(F.normalize(features, dim=1)[None], LABELS[None], 5)
    torch.testing.assert_close(heads[0, -5:], torch.tensor(BIASES), atol=1e-4, rtol=1e-3)
