"""Many networks at once give what each gives alone, whatever the layers' settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flown import nets
from flown.nets.batched import stacked

_CASES = {
    "cnn-small": (lambda: nets.build("cnn-small", 1, 10, "tanh"), (1, 28)),
    "cnn-small colour gelu": (lambda: nets.build("cnn-small", 3, 7, "gelu"), (3, 28)),
    "cnn-medium": (lambda: nets.build("cnn-medium", 3, 10, "silu"), (3, 32)),
    "stride, padding, dilation": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3, padding=2, dilation=2),
            nn.Flatten(),
            nn.Linear(128, 4),
        ),
        (1, 15),
    ),
    "oblong kernels": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 2)), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 5 * 6, 4)
        ),
        (2, 13),
    ),
    "other pooling": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.MaxPool2d(3, 1),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Tanh(),
            nn.MaxPool2d(2, padding=1),
            nn.Flatten(),
            nn.Linear(3 * 3 * 3, 4),
        ),
        (1, 13),
    ),
    "no bias": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False),
            nn.Conv2d(3, 2, 2, bias=False),
            nn.Flatten(),
            nn.Linear(2 * 4 * 4, 3, bias=False),
            nn.Tanh(),
            nn.Linear(3, 2),
        ),
        (1, 7),
    ),
    "one position": (lambda: nn.Sequential(nn.Conv2d(1, 4, 6), nn.Flatten()), (1, 6)),
    "same padding": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(2 * 36, 3)
        ),
        (1, 6),
    ),
}


def one_by_one(net: nn.Module, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    n = len(next(iter(tensors.values())))
    parts = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(n)]
    with torch.no_grad():
        return torch.stack([torch.func.functional_call(net, p, (images,)) for p in parts])


def draw(
    case: str, n: int, count: int, scale: float = 0.3
) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    make, (channels, side) = _CASES[case]
    net, generator = make(), torch.Generator().manual_seed(0)
    tensors = {
        name: scale * torch.randn(n, *p.shape, generator=generator)
        for name, p in net.named_parameters()
    }
    return net, tensors, torch.randn(count, channels, side, side, generator=generator)


@pytest.mark.parametrize("n", [1, 8, 11])
@pytest.mark.parametrize("case", _CASES)
def test_equals_one_by_one(case: str, n: int) -> None:
    net, tensors, images = draw(case, n, 13)
    expected = one_by_one(net, tensors, images)
    with torch.no_grad():
        found = stacked.forward(net, tensors, images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with_gradients = stacked.forward(net, tensors, images.requires_grad_())
    torch.testing.assert_close(with_gradients, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0, 10.0])
def test_as_exact_as_one_by_one(scale: float) -> None:
    """Large weights magnify rounding errors, small ones show tanh near zero."""
    net, tensors, images = draw("cnn-small", 8, 20, scale)
    with torch.no_grad():
        found = stacked.forward(net, tensors, images)
    usual = one_by_one(net, tensors, images)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    truth = one_by_one(net.double(), double, images.double())
    assert (found - truth).abs().max() < 3 * (usual - truth).abs().max() + 1e-7


def test_inputs_are_left_as_they_are() -> None:
    net, tensors, images = draw("no bias", 3, 5)
    before = {name: tensor.clone() for name, tensor in tensors.items()} | {"": images.clone()}
    with torch.no_grad():
        stacked.forward(net, tensors, images)
    assert all(torch.equal(before[k], v) for k, v in {**tensors, "": images}.items())


def test_gradients_of_images_take_the_other_path(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tensors, images = draw("cnn-small", 2, 3)
    monkeypatch.setattr(stacked, "_compiled", lambda *_: pytest.fail("no gradients there"))
    some = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    stacked.forward(net, some, images.requires_grad_()).sum().backward()
    assert images.grad is not None
    assert all(tensor.grad is not None for tensor in some.values())


class _Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and "view" not in str(func) and "expand" not in str(func):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("n", [1, 7, 200])
@pytest.mark.parametrize("net", ["cnn-medium", "resnet18"])
def test_memory_off_the_cpu_is_bounded(net: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which keeps shapes alone and goes the way of a GPU."""
    built = nets.build(net, 3, 10, "relu").eval().to("meta")
    kept = {"conv1.weight"} if net == "resnet18" else {name for name, _ in built.named_parameters()}
    tensors = {
        name: torch.empty(n, *tensor.shape, device="meta")
        for name, tensor in built.named_parameters()
        if name in kept
    }
    frozen = {k: v for k, v in built.state_dict().items() if k not in kept}
    images = torch.empty(60, 3, 32, 32, device="meta")
    width = stacked.widest(built, images)
    budget = 100 * width
    monkeypatch.setattr(stacked, "_GPU_NUMBERS", budget)
    with torch.no_grad(), _Largest() as largest:
        size, some = stacked.chunk(built, n, images, net == "resnet18", general=True)
        logits = stacked.forward(built, tensors, images, frozen if net == "resnet18" else None)
    assert logits.shape == (n, 60, 10)
    assert 50 <= size * some <= 100, "as much at once as fits"
    most = max(
        budget, logits.numel(), *(x.numel() for x in (images, *tensors.values(), *frozen.values()))
    )
    assert width * 50 <= largest.numbers <= most


def test_the_widest_layer_by_hand() -> None:
    net = nets.build("cnn-medium", 3, 10, "relu")
    assert stacked.widest(net, torch.empty(1, 3, 32, 32)) == 16 * 30 * 30
    assert not net._forward_hooks and not net[0]._forward_hooks


@pytest.mark.parametrize("n", [1, 40])
def test_chunks_of_networks_and_images_change_nothing(
    n: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nets.build("cnn-small", 1, 10, "tanh")
    tensors = {
        name: torch.randn(n, *x.shape, generator=generator) for name, x in net.named_parameters()
    }
    images = torch.randn(11, 1, 28, 28, generator=generator)
    with torch.no_grad():
        whole = stacked.forward(net, tensors, images)
        monkeypatch.setattr(stacked, "_compiled", lambda *some: None)
        monkeypatch.setattr(stacked, "chunk", lambda *_, **__: (3, 4))
        torch.testing.assert_close(
            stacked.forward(net, tensors, images), whole, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (1, 4, 7, 9), (3, 2, 2, 3)])
def test_pooling_by_maxima_is_pytorchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    x[0, 0, 1, 1] = torch.nan
    halves, thirds, odd = nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2, 2, ceil_mode=True)
    for layer in (halves, thirds, odd, nn.Tanh()):
        torch.testing.assert_close(
            stacked.alone(layer, x), layer(x), rtol=0, atol=0, equal_nan=True
        )
    x = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(stacked.alone(halves, x).sum(), x)
    (wanted,) = torch.autograd.grad(halves(x).sum(), x)
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_stay_in_the_order_of_memory_that_is_fast(channels: int) -> None:
    images = stacked.channels_last(torch.randn(2, channels, 8, 8))
    found = nn.functional.conv2d(images, torch.randn(4, channels, 3, 3))
    assert found.is_contiguous(memory_format=torch.channels_last)
