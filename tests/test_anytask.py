"""The any-task generator: equivariance, the ridge head, one truth on disk, bad input, training."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import flown
from flown import training
from flown.anytask import model as any_model
from flown.anytask.config import AnyTaskConfig, BaseConfig
from flown.anytask.evidence import weigh
from flown.anytask.fit import fit
from flown.anytask.model import AnyTask
from flown.anytask.ridge import confidence, left_out
from flown.anytask.trunk import Trunk
from flown.anytask.units import Moments
from flown.anytask.writer import Writer
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.tasks import draw_support, load
from flown.tasks.looks import Looks
from flown.tasks.stream import StreamConfig
from flown.training import LoopConfig

ONE = torch.ones(1, 1, dtype=torch.float64)  # the share of a single base network
TINY = AnyTaskConfig(
    nets={"cnn-small": 0.5, "conv4-8": 0.5},
    numbers=8,
    width=16,
    depth=1,
    heads=2,
    tasks=StreamConfig(pools={"glyphs": 1.0}, ways=6, shots=3, images=60, queries=12),
    base=BaseConfig(
        ways=12,
        shots=3,
        images=60,
        training=LoopConfig(steps=4, validate_every=4, warmup=1, ema=0.5),
    ),
    training=LoopConfig(steps=6, checkpoint_every=2, validate_every=6, warmup=1, ema=0.5),
)


@pytest.fixture(scope="module")
def model() -> AnyTask:
    """Untrained, but for rows that tokens write."""
    made = AnyTask(TINY)
    for name, writer in made.writers.items():
        generator = torch.Generator().manual_seed(len(name))
        shape = writer.head_decoder.shape
        writer.head_decoder.data = 0.1 * torch.randn(shape, generator=generator)
    with seeded(0):
        made.trunk.leave.reset_parameters()
    return made.eval().requires_grad_(False)


@pytest.fixture
def support() -> tuple[Tensor, Tensor]:
    images, labels = draw_support(
        load("digits").train, 5, 3, torch.Generator().manual_seed(0), [*range(5)]
    )
    return images, labels


def test_permuted_classes_permute_what_is_written() -> None:
    torch.manual_seed(0)
    trunk, writer = Trunk(8, 16, 2, 2).double(), Writer("conv4-8", 16, 8).double()
    torch.nn.init.normal_(writer.head_decoder)
    trunk.leave.reset_parameters()
    order, ways = torch.tensor([2, 0, 3, 1]), 4
    images = torch.randn(1, 8, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    x = torch.randn(1, len(writer.neurons) + ways, 8, dtype=torch.float64)
    hidden, rows = x.split([len(writer.neurons), ways], dim=1)
    t = torch.tensor([0.25], dtype=torch.float64)
    places = order.argsort()[labels]  # class order[k] is now called k

    def written(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        end = trunk(x, t, writer.neurons, trunk.see(images, labels, ways).classes)
        features = torch.randn(1, 8, writer.features, dtype=torch.float64, generator=g())
        head = writer.write_head(end[:, len(writer.neurons) :], ONE, features, labels)
        return end[:, : len(writer.neurons)], head

    def g() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    body, head = written(x, labels)
    body_, head_ = written(torch.cat([hidden, rows[:, order]], dim=1), places)
    assert torch.allclose(body, body_, atol=1e-10)
    assert torch.allclose(head[:, order], head_, atol=1e-9)


@pytest.mark.parametrize("net", ["conv4-8", "cnn-small", "cnn-medium"])
@pytest.mark.parametrize("channels", [1, 3])
def test_layers_are_in_the_units_of_the_support_set(net: str, channels: int) -> None:
    """Means and deviations are the biases and gains that tokens write; the network alone has them too."""
    torch.manual_seed(0)
    writer = Writer(net, 16, 8).double()
    for units in writer.units:
        units.trust.data.copy_(torch.tensor([60.0, 0.0]))  # in the support set alone
    x = torch.randn(2, len(writer.neurons), 8, dtype=torch.float64)
    images = torch.randn(2, 6, channels, writer.kind.size, writer.kind.size, dtype=torch.float64)
    body, features = writer.write_body(x, ONE, images)
    assert torch.allclose(writer.compute(body, images), features, atol=1e-9)
    for i in range(2):
        h = images[i]
        net_ = writer.bodies[channels]
        for place, layer in enumerate(net_):
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                h = torch.func.functional_call(
                    layer, {key: body[f"{place}.{key}"][i] for key in ("weight", "bias")}, (h,)
                )
                rows = h.movedim(1, -1).flatten(0, -2)
                name = writer.names.index(str(place))
                written = list(writer._layers(x, ONE))[name]
                assert torch.allclose(rows.mean(dim=0), written[3][i], atol=1e-9)
                assert torch.allclose(rows.std(dim=0, correction=0), written[2][i].abs(), rtol=0.05)
            else:
                h = layer(h)
    shared, _ = writer.write_body(x, ONE, images[0])
    assert all(torch.allclose(shared[k][0], body[k][0], atol=1e-9) for k in body)


def test_moments_are_those_of_pytorch_and_so_are_their_gradients() -> None:
    torch.manual_seed(0)
    z = torch.randn(5, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    variance, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
    for found, wanted in zip(Moments.apply(z), (mean, variance), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.autograd.gradcheck(Moments.apply, z)


def test_units_that_trust_no_image_are_those_of_all_tasks() -> None:
    torch.manual_seed(0)
    writer = Writer("conv4-8", 16, 8).double()
    for units in writer.units:
        units.trust.data.copy_(torch.tensor([-60.0, 0.0]))
    x = torch.randn(1, len(writer.neurons), 8, dtype=torch.float64)
    first, second = (
        writer.write_body(x, ONE, scale * torch.randn(5, 3, 32, 32, dtype=torch.float64))[0]
        for scale in (1, 9)
    )
    assert all(torch.allclose(first[key], second[key]) for key in first)


def test_a_base_network_is_a_mixture_and_follows_the_images(model: AnyTask) -> None:
    """Shares weigh weights before they become directions, and are those of the support set alone."""
    torch.manual_seed(0)
    writer = Writer("conv4-8", 16, 8, experts=2).double()
    for parameter in (*writer.base, writer.regression):
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.zeros(1, len(writer.neurons), 8, dtype=torch.float64)
    shares = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    mixed, _ = writer.write_body(x, shares, images)
    single = Writer("conv4-8", 16, 8).double()
    for one, both in zip(single.base, writer.base, strict=True):
        one.data = (0.25 * both[:1] + 0.75 * both[1:]).detach()
    alone, _ = single.write_body(x, ONE, images)
    assert all(torch.allclose(mixed[key], alone[key], atol=1e-9) for key in alone)
    found = model.trunk.see(torch.rand(3, 6, 3, 32, 32), torch.arange(6).expand(3, -1) % 2, 2)
    assert torch.allclose(found.shares.sum(dim=1), torch.ones(3))
    assert (found.shares > 0).all() and found.shares.shape == (3, TINY.experts)


@pytest.mark.parametrize("better", [0, 1])
def test_a_support_set_speaks_for_the_base_network_that_tells_its_classes_apart(
    better: int,
) -> None:
    torch.manual_seed(0)
    writer = Writer("conv4-8", 16, 8, experts=2).double().requires_grad_(False)
    for base in writer.base:
        base[1 - better] = 0  # computes the same of every image
    labels = torch.arange(20) % 2
    images = torch.randn(20, 3, 32, 32, dtype=torch.float64)
    images[1::2, :, ::4] += 9  # stripes
    gate = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    shares = weigh(writer, gate, images, labels)
    assert shares[0, better] > 0.9 and torch.allclose(shares.sum(), ONE)
    again = weigh(writer, gate, images, 1 - labels)
    assert torch.allclose(shares, again, atol=0.02)
    few = weigh(writer, gate, images[:3], labels[:3])
    assert few[0, better] < shares[0, better], "three images tell less"
    assert torch.equal(weigh(writer, gate, images[:2], labels[:2]), gate), "one of a class nothing"
    sure = torch.tensor([[0.01, 0.99]], dtype=torch.float64)
    assert weigh(writer, sure, images, labels)[0, 0] < shares[0, 0]


@pytest.mark.parametrize("count", [6, 60])
def test_the_head_is_a_ridge_regression(count: int) -> None:
    """Fewer images than features and more of them: both are numpy's least squares."""
    torch.manual_seed(0)
    writer = Writer("conv4-8", 16, 8).double()
    features = torch.randn(1, count, writer.features, dtype=torch.float64)
    labels = torch.arange(count)[None] % 3
    head = writer.write_head(torch.zeros(1, 3, 8, dtype=torch.float64), ONE, features, labels)
    a = np.hstack([features[0].numpy(), np.ones((count, 1))])
    shrink, scale = writer.regression[0].exp().tolist()
    penalty = shrink * (a**2).sum() / count
    y = np.eye(3)[labels[0].numpy()] - 1 / 3
    stacked = np.vstack([a, np.sqrt(penalty) * np.eye(a.shape[1])])
    wanted, *_ = np.linalg.lstsq(stacked, np.vstack([y, np.zeros((a.shape[1], 3))]), rcond=None)
    assert np.allclose(head[0].detach().numpy(), scale * wanted.T, atol=1e-9)


@pytest.mark.parametrize("count", [6, 60])
def test_left_out_images_are_told_by_the_regression_without_them(count: int) -> None:
    """One of every class at a time; a class that has no more keeps what it has, the only one too."""
    torch.manual_seed(0)
    features = torch.randn(2, count + 1, 20, dtype=torch.float64)
    labels = torch.cat([torch.arange(count) % 3, torch.tensor([3])])
    found = left_out(features, labels, 4, 0.1)
    a = np.concatenate([features.numpy(), np.ones((2, count + 1, 1))], axis=2)
    y = np.eye(4)[labels.numpy()] - 1 / 4
    for turn in (0, count // 3 - 1):
        out = np.arange(3 * turn, 3 * turn + 3)
        kept = np.setdiff1d(np.arange(count + 1), out)
        for n in range(2):
            penalty = 0.1 * (a[n] ** 2).sum() / (count + 1) * np.eye(21)
            rows = np.linalg.solve(a[n, kept].T @ a[n, kept] + penalty, a[n, kept].T @ y[kept])
            assert np.allclose(found[n, out].numpy(), a[n, out] @ rows, atol=1e-9)


def test_left_out_images_of_no_use_are_guessed_at_chance() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(50, 50, 40), torch.arange(50) % 10
    right = left_out(features, labels, 10, 0.1).argmax(dim=-1) == labels
    assert abs(float(right.float().mean()) - 0.1) < 0.02


def test_confidence_is_right_on_images_left_out() -> None:
    """Features that say nothing make a head less sure, those that say enough do not."""
    torch.manual_seed(0)
    writer, x = Writer("conv4-8", 16, 8).requires_grad_(False), torch.zeros(1, 4, 8)
    labels = torch.arange(40) % 4
    told = torch.nn.functional.one_hot(labels, writer.features).float()[None]

    def sure(features: Tensor, count: int = 40) -> float:
        asked = labels[:count]
        return confidence(writer.left_out(x, ONE.float(), features[:, :count], asked), asked)

    noise = torch.randn(1, 40, writer.features)
    assert sure(noise) < 0.25 and sure(3 * told + 0.1 * noise) > 0.8
    assert abs(sure(noise, count=4) - 1) < 1e-6, "no class has a second image"


def test_the_mean_of_networks_is_as_sure_as_it_is_right() -> None:
    """Networks that contradict each other have a modest mean: each of them has to be surer."""
    labels, generator = torch.arange(300) % 3, torch.Generator().manual_seed(0)
    right = torch.nn.functional.one_hot(labels, 3).float()
    logits = right + torch.randn(20, 300, 3, generator=generator)
    alone, together = confidence(logits[:1], labels), confidence(logits, labels)

    def gap(factor: float, some: Tensor) -> float:
        p = (factor * some).softmax(-1).mean(dim=0)
        return float((p.argmax(1) == labels).float().mean() - p.amax(1).mean())

    assert abs(gap(alone, logits[:1])) < 0.05
    assert together > 2 * alone and abs(gap(together, logits)) < 0.8 * gap(alone, logits)


def test_the_order_of_images_is_nothing(model: AnyTask, support: tuple[Tensor, Tensor]) -> None:
    images, labels = support
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = (
        model.generate(images, labels, 2),
        model.generate(images[order], labels[order], 2),
    )
    assert torch.allclose(first.vectors, second.vectors, atol=0.01)


def _further(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Further views for three networks, and the rows of the images."""
    looks, rows = Looks(torch.Generator().manual_seed(0)), any_model._viewed(labels, count)
    return any_model._views(looks, images, rows, 3), torch.cat(rows)


def test_few_images_are_seen_in_more_views(model: AnyTask, support: tuple[Tensor, Tensor]) -> None:
    """Each twice and a class five times; the order of images or classes changes nothing."""
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    images = torch.rand(10, 1, 28, 28)
    found, rows = _further(images, labels, 5)
    assert found.shape == (3, len(rows), 1, 28, 28)
    assert (found[0] - found[1]).abs().mean() > 0.05, "of its own for every network"
    found = found[0]
    assert (labels[rows].bincount() + labels.bincount()).tolist() == [5, 6, 14]
    assert (found - images[rows]).abs().mean() > 0.05
    order = torch.randperm(10)
    found_, rows_ = _further(images[order], 2 - labels[order], 5)
    found_ = found_[0]
    pairs, pairs_ = (
        sorted((int(r), round(float(x.sum()), 3)) for x, r in zip(*some, strict=True))
        for some in ((found, rows), (found_, order[rows_]))
    )
    assert pairs == pairs_
    assert not any_model._viewed(labels, 1)
    one = model.generate(support[0][::3], support[1][::3], 2)
    with_one_view = AnyTask(TINY.model_copy(update={"views": 1}))
    with_one_view.load_state_dict(model.state_dict())
    other = with_one_view.generate(support[0][::3], support[1][::3], 2)
    same = [torch.allclose(a, b) for a, b in zip(one.vectors, other.vectors, strict=True)]
    assert not any(same)


def test_the_same_seed_gives_the_same_networks(
    model: AnyTask, support: tuple[Tensor, Tensor]
) -> None:
    first, again, other = (model.generate(*support, n=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.allclose(first.vectors, other.vectors)
    assert not torch.allclose(first.vectors[0], first.vectors[1])


@pytest.mark.parametrize("net", list(TINY.nets))
def test_grey_networks_are_colour_networks_of_equal_channels(
    model: AnyTask, support: tuple[Tensor, Tensor], net: str
) -> None:
    images, labels = support
    grey = model.generate(images, labels, n=2, net=net)
    colour = model.generate(images.expand(-1, 3, -1, -1), labels, n=2, net=net)
    assert (grey.layout.architecture.channels, colour.layout.architecture.channels) == (1, 3)
    found = grey.logits(grey.preprocess(images))
    wanted = colour.logits(colour.preprocess(images.expand(-1, 3, -1, -1)))
    assert torch.allclose(found, wanted, atol=2e-3)
    module = grey.module(1)
    assert torch.allclose(module(grey.preprocess(images)), found[1], atol=1e-3)


def test_images_of_any_size_and_kind(model: AnyTask) -> None:
    torch.manual_seed(0)
    labels = torch.arange(4) % 2
    for images in (
        torch.rand(4, 3, 50, 41),
        torch.randint(256, (4, 1, 9, 9), dtype=torch.uint8),
        torch.rand(4, 30, 20, dtype=torch.float64),
        torch.rand(4, 1, 200, 100).half(),
    ):
        batch = model.generate(images, labels, n=3)
        accuracies = flown.evaluate(batch, images, labels)
        assert len(batch) == 3 and ((accuracies >= 0) & (accuracies <= 100)).all()


def test_what_is_saved_is_what_is_loaded(
    model: AnyTask, support: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    loaded = flown.Flown.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, AnyTask) and loaded.config == TINY
    first, second = model.generate(*support, n=2), loaded.generate(*support, n=2)
    assert torch.allclose(first.vectors, second.vectors, rtol=0.02, atol=0.02)  # half precision
    loaded.save(tmp_path / "again")
    again = AnyTask.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(*support, n=2).vectors, second.vectors)
    file = tmp_path / "model" / "generator.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FlownError, match=r"generator\.safetensors"):
        AnyTask.from_pretrained(tmp_path / "model")
    with pytest.raises(FlownError, match="holds no any-task generator"):
        AnyTask.from_pretrained(tmp_path / "nothing")


def test_bad_support_sets_are_refused(model: AnyTask, support: tuple[Tensor, Tensor]) -> None:
    images, labels = support
    for message, arguments in {
        "has 7 classes, this model writes networks for 2 to 6": (images[:7], torch.arange(7)),
        "has 1 classes": (images[:2], torch.zeros(2, dtype=torch.int64)),
        "class 1 of 3 has no image": (images[:2], torch.tensor([0, 2])),
        "expected 15, got": (images, labels[-3:]),
        "has 0 classes": (images[:0], labels[:0]),
        "floats must lie in": (images.float(), labels),
        "NaN or Inf": (images / torch.zeros(()), labels),
        "expected \\(N, 1 or 3, H, W\\)": (images.expand(-1, 2, -1, -1), labels),
    }.items():
        with pytest.raises(FlownError, match=message):
            model.generate(*arguments)
    with pytest.raises(FlownError, match="n: must be 1 or more"):
        model.generate(images, labels, n=0)
    with pytest.raises(FlownError, match="steps: must be 1 or more"):
        model.generate(images, labels, steps=0)
    with pytest.raises(FlownError, match="Did you mean 'conv4-8'"):
        model.generate(images, labels, net="conv4_8")


def test_one_image_in_two_classes_is_warned_about(
    model: AnyTask, support: tuple[Tensor, Tensor]
) -> None:
    images, labels = support[0].clone(), support[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(images, labels, n=1)
    images[3] = images[0]
    with pytest.warns(UserWarning, match="one image is in classes 0 and 1"):
        model.generate(images, labels, n=1)


def test_training_changes_every_part_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(TINY, out=tmp_path / "whole")
    fresh = AnyTask(TINY).state_dict()
    same = [k for k, v in whole.state_dict().items() if torch.equal(v, fresh[k])]
    assert same == [], "these parts learn nothing"
    save = training._Run.save

    def saving(self: training._Run, path: Path, step: int) -> None:
        save(self, path, step)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "save", saving)
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, out=tmp_path / "killed")
    monkeypatch.setattr(training._Run, "save", save)
    resumed = fit(TINY, out=tmp_path / "killed", resume=True)
    for (key, value), (_, wanted) in zip(
        resumed.state_dict().items(), whole.state_dict().items(), strict=True
    ):
        assert torch.equal(value, wanted), key
    with pytest.raises(FlownError, match="another config"):
        fit(TINY.model_copy(update={"seed": 1}), out=tmp_path / "killed", resume=True)
    assert (tmp_path / "whole" / "model" / "config.json").exists()


def test_a_batch_size_that_nothing_reads_is_refused() -> None:
    """The size of a draw follows from `tasks.images`."""
    for key in ("training", "base.training"):
        with pytest.raises(FlownError, match="unknown key 'batch_size'"):
            AnyTaskConfig().override([f"{key}.batch_size=64"])
