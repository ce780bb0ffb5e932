"""The compiled engine does what torch does: gradients, Adam, pooling, every activation."""

from __future__ import annotations

import runpy
from pathlib import Path

import numba
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import nets
from flown.nets.architecture import Architecture
from flown.nets.batched import jit, stacked
from flown.nets.batched.program import Program
from flown.weights.layout import WeightLayout
from flown.zoo.train.trainers import Stacked, Threads, trainer


def lenet() -> nn.Sequential:
    """Odd heights and widths, pooling only once, no bias here and there."""
    return nn.Sequential(
        *(nn.Conv2d(2, 5, (3, 2), bias=False), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(5, 9, 3)),
        *(nn.LeakyReLU(), nn.Flatten(), nn.Linear(9 * 3 * 4, 7, bias=False), nn.SiLU()),
        nn.Linear(7, 3),
    )


torch.manual_seed(0)
NETS = {
    **{
        f"cnn-small-{a}": (nets.build("cnn-small", 1, 10, a), (1, 28, 28)) for a in nets.ACTIVATIONS
    },
    "cnn-medium": (nets.build("cnn-medium", 3, 10, "tanh"), (3, 32, 32)),
    "lenet": (lenet(), (2, 13, 14)),
    "mlp": (nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.GELU(), nn.Linear(6, 2)), (3, 4, 4)),
}


def data(shape: tuple[int, int, int], classes: int, n: int = 44) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, *shape, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


def loop(
    net: nn.Module,
    vector: Tensor,
    x: Tensor,
    y: Tensor,
    order: Tensor,
    batch: int,
    rate: float,
    decay: float,
) -> tuple[Tensor, float]:
    """The same training, by torch's own modules and optimiser, in float64."""
    net = net.double()
    nn.utils.vector_to_parameters(vector.double(), net.parameters())
    optimizer = torch.optim.Adam(net.parameters(), rate, weight_decay=decay)
    total = 0.0
    for rows in order[: len(order) - len(order) % batch].split(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows].double()), y[rows])
        loss.backward()
        optimizer.step()
        total += loss.item()
    found = nn.utils.parameters_to_vector(net.parameters()).detach()
    net.float()
    return found, total


@pytest.mark.parametrize("engine", ["threads", "stacked"])
@pytest.mark.parametrize("name", NETS)
def test_engines_train_as_torch_does(name: str, engine: str) -> None:
    net, shape = NETS[name]
    architecture = Architecture(
        net="n", channels=shape[0], size=shape[1], outputs=2, activation="tanh", mean=0, std=1
    )
    layout = WeightLayout.of(net, architecture)
    classes = int(list(net.parameters())[-1].shape[0])
    x, y = data(shape, classes)
    generator = torch.Generator().manual_seed(1)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    vectors = torch.stack([start, start + 0.01 * torch.randn(start.shape, generator=generator)])
    orders = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(2)])
    rates, decays = [1e-3, 3e-3], [0.0, 1e-2]
    if engine == "threads":
        made = trainer(net, layout, vectors, x, 10, rates, decays, "cpu")
        assert isinstance(made, Threads)
    else:
        made = Stacked(net, layout, vectors, x, 10, rates, decays, "cpu")
    losses = sum(
        made.run(orders[:, part], y[orders[:, part]], step)
        for part, step in ((slice(0, 20), 0), (slice(20, None), 2))
    )
    for i in range(2):
        expected, total = loop(net, vectors[i], x, y, orders[i], 10, rates[i], decays[i])
        assert losses[i] == pytest.approx(total, abs=1e-5)
        # Adam's first steps have the gradient's sign: where it is near zero, rounding decides.
        near = (made.vectors[i].double() - expected).abs() < 2e-5
        assert near.double().mean() > 0.995
        moved = (made.vectors[i] - vectors[i]).double()
        assert F.cosine_similarity(moved, expected - vectors[i], dim=0) > 0.9999


def test_what_is_kept_belongs_to_all_files_that_take_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade that changes one of them must not run what was compiled of another version."""
    made = []
    for version in (b"a", b"b"):
        (tmp_path / "kernels.py").write_bytes(version)
        monkeypatch.setattr(Path, "glob", lambda folder, pattern: [tmp_path / "kernels.py"])
        fresh = runpy.run_path(jit.__file__)
        made.append(fresh["compiled"](_twice))
    monkeypatch.undo()
    assert [one(2) for one in made] == [4, 4]
    first, second = (one._cache.cache_path for one in made)
    assert first != second and Path(first).parent.parent == Path(__file__).parent / "__pycache__"
    assert numba.config.CACHE_DIR in (None, "")  # type: ignore[attr-defined]


def _twice(x: int) -> int:
    return 2 * x


def test_a_network_gives_the_same_bits_alone() -> None:
    net, shape = NETS["cnn-small-tanh"]
    x, y = data(shape, 10)
    vectors = torch.stack([nn.utils.parameters_to_vector(net.parameters()).detach()] * 3)
    vectors = vectors + 0.1 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    orders = torch.stack(
        [torch.randperm(44, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    program = Program.of(net, shape)
    assert program is not None
    together = Threads(program, vectors, x, 8, [1e-3] * 3, [0.0] * 3)
    alone = Threads(program, vectors[1:2], x, 8, [1e-3], [0.0])
    together.run(orders, y[orders], 0)
    alone.run(orders[1:2], y[orders[1:2]], 0)
    assert torch.equal(together.vectors[1], alone.vectors[0])


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_torchs(name: str) -> None:
    """For more images than run at a time, of networks that share them."""
    net, shape = NETS[name]
    x, _ = data(shape, 2, n=70)
    generator = torch.Generator().manual_seed(1)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    vectors = start + 0.1 * torch.randn(3, len(start), generator=generator)
    weights = {key: torch.empty(3, *p.shape) for key, p in net.named_parameters()}
    layout = [(key, tuple(t.shape[1:])) for key, t in weights.items()]

    def run(leaf: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = leaf.split([torch.Size(size).numel() for _, size in layout], dim=1)
        tensors = {k: p.unflatten(1, s) for (k, s), p in zip(layout, parts, strict=True)}
        logits = stacked.forward(net.to(leaf.dtype), tensors, images.to(leaf.dtype))
        above = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        return logits, torch.autograd.grad(logits, leaf, above.to(leaf.dtype))[0]

    logits, found = run(vectors.clone().requires_grad_(), x)
    expected_logits, expected = run(vectors.double().requires_grad_(), x)
    net.float()
    assert type(logits.grad_fn).__name__ == "_CompiledLogitsBackward"
    torch.testing.assert_close(logits.double(), expected_logits, atol=1e-5, rtol=1e-5)
    # Where two pooled numbers are equal but for rounding, either may have the gradient.
    near = (found.double() - expected).abs() < 1e-4 * expected.abs().amax()
    assert near.double().mean() > 0.995
    assert (F.cosine_similarity(found.double(), expected, dim=1) > 0.9999).all()


def test_divergence_shows_in_the_loss() -> None:
    net, shape = NETS["cnn-small-relu"]
    x, y = data(shape, 10)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()[None]
    engine = Threads.of(net, start, x, 8, [1e30], [0.0])
    assert engine is not None
    assert not torch.isfinite(engine.run(torch.arange(44)[None], y[None], 0)).any()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Conv2d(1, 4, 3, stride=2),
        nn.Conv2d(1, 4, 3, dilation=2),
        nn.BatchNorm2d(1),
        nn.Dropout(),
        nn.GELU(approximate="tanh"),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(3),
        nn.Linear(7, 2),
    ],
)
def test_what_it_cannot_do_it_leaves(layer: nn.Module) -> None:
    assert Program.of(nn.Sequential(layer), (1, 8, 8)) is None
