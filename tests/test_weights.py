"""Weight batches: all networks at once equal a loop over modules; files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flown import nets
from flown.base.errors import FlownError
from flown.nets.batched import stacked
from flown.weights.batch import WeightBatch
from tests.test_layout import layout


def batch(net: str = "cnn-small", channels: int = 1, n: int = 5) -> WeightBatch:
    key = layout(net, channels)
    return WeightBatch(
        key, 0.2 * torch.randn(n, key.size, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("net", ["cnn-small", "cnn-medium"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 19])
def test_all_at_once_equals_a_loop(net: str, channels: int, n: int) -> None:
    some = batch(net, channels, n)
    images = torch.randn(7, channels, nets.INPUT_SIZES[net], nets.INPUT_SIZES[net])
    looped = torch.stack([some.module(i)(images) for i in range(n)])
    assert torch.allclose(some.logits(images), looped, atol=1e-4)


def test_own_images_and_gradients() -> None:
    """With images of their own, networks get the gradients they would get alone."""
    some = batch(n=3)
    images = torch.randn(3, 4, 1, 28, 28)
    tensors = {k: v.clone().requires_grad_() for k, v in some.layout.unpack(some.vectors).items()}
    stacked.forward(some.architecture, tensors, images).square().sum().backward()
    for i in range(3):
        net = some.module(i)
        net(images[i]).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            assert torch.allclose(tensors[name].grad[i], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_other_networks_go_through_vmap() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear((x + self.conv(x)).mean((2, 3)))

    net = Residual()
    tensors = {k: torch.randn(6, *v.shape) for k, v in net.named_parameters()}
    images = torch.randn(5, 1, 8, 8)
    every = stacked.forward(net, tensors, images)
    for i in range(6):
        alone = torch.func.functional_call(net, {k: v[i] for k, v in tensors.items()}, (images,))
        assert torch.allclose(every[i], alone, atol=1e-5)


def test_file_round_trip(tmp_path: Path) -> None:
    some = batch()
    some.provenance["seed"] = 3
    some.save(tmp_path / "nets.safetensors")
    again = WeightBatch.load(tmp_path / "nets.safetensors")
    assert torch.equal(again.vectors, some.vectors)
    assert again.layout == some.layout and again.provenance == {"seed": 3}


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "nets.safetensors"
    batch().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FlownError, match=r"nets.safetensors: truncated"):
        WeightBatch.load(path)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(FlownError, match="without flown's layout"):
        WeightBatch.load(tmp_path / "foreign.safetensors")
    with pytest.raises(FlownError, match="no such file"):
        WeightBatch.load(tmp_path / "none.safetensors")


def test_nan_is_never_written(tmp_path: Path) -> None:
    some = batch()
    some.vectors[1, 7] = float("nan")
    with pytest.raises(FlownError, match=r"'0.weight' holds NaN"):
        some.save(tmp_path / "nets.safetensors")
    assert not list(tmp_path.iterdir())
