"""Weight matching: exact for permuted copies, never farther away, the same functions, zoos kept."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flown
from flown import nets
from flown import tasks as data
from flown.base.errors import FlownError
from flown.base.files import read_json
from flown.nets.structure.symmetry import Group, groups
from flown.weights.batch import WeightBatch
from flown.weights.layout import Task, WeightLayout
from flown.zoo import Zoo
from flown.zoo.align.align import align_zoo, spread
from flown.zoo.align.matching import align, groups_of, permute

SEEDS = st.integers(0, 2**31)


def layout(activation: str = "tanh", channels: int = 1) -> WeightLayout:
    task = Task(
        name="t",
        channels=channels,
        size=28,
        mean=0.5,
        std=0.5,
        classes=tuple("0123456789"),
        activation=activation,
    )
    return WeightLayout.of(nets.build("cnn-small", channels, 10, activation), "cnn-small", task)


def random_batch(of: WeightLayout, n: int, generator: torch.Generator) -> WeightBatch:
    """Networks whose tensors differ in size as real ones do."""
    net = nets.build(of.net, of.task.channels, 10, of.task.activation)
    sizes = torch.cat([p.detach().std().expand(p.numel()) for p in net.parameters()])
    return WeightBatch(of, torch.randn(n, of.size, generator=generator) * sizes)


def scrambled(
    batch: WeightBatch, found: tuple[Group, ...], generator: torch.Generator
) -> WeightBatch:
    n = len(batch)
    orders = [torch.rand(n, g.size, generator=generator).argsort(dim=1) for g in found]
    flips = [
        (torch.randint(2, (n, g.size), generator=generator) * 2.0 - 1) ** (2 - g.signs)
        for g in found
    ]
    tensors = permute(batch.layout.unpack(batch.vectors), found, orders, flips)
    return WeightBatch(batch.layout, batch.layout.pack(tensors))


def distance(batch: WeightBatch, reference: Tensor) -> Tensor:
    return (batch.vectors - reference).norm(dim=1)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, activation=st.sampled_from(["tanh", "gelu"]), channels=st.sampled_from([1, 3]))
def test_a_scrambled_copy_is_brought_back_exactly(
    seed: int, activation: str, channels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    of = layout(activation, channels)
    original = random_batch(of, 1, generator)
    copies = WeightBatch(of, original.vectors.repeat(6, 1))
    found = groups_of(of)
    back = align(scrambled(copies, found, generator), original.vectors[0], groups=found)
    assert torch.equal(back.batch.vectors, copies.vectors)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_alignment_changes_order_alone_and_never_adds_distance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(layout(), 5, generator)
    aligned = align(batch, batch.vectors[0])
    assert torch.equal(aligned.batch.vectors[0], batch.vectors[0])
    before, after = (distance(x, batch.vectors[0]) for x in (batch, aligned.batch))
    assert (after <= before * (1 + 1e-5)).all() and after[1:].mean() < before[1:].mean()
    remade = permute(
        batch.layout.unpack(batch.vectors), aligned.groups, aligned.permutations, aligned.signs
    )
    assert torch.equal(batch.layout.pack(remade), aligned.batch.vectors)
    images = torch.randn(4, 1, 28, 28, generator=generator)
    assert torch.allclose(aligned.batch.logits(images), batch.logits(images), atol=1e-5, rtol=1e-4)


def test_one_assignment_is_the_best_of_all_orders() -> None:
    """Three hidden units: the optimum over all 3! 2^3 signed orders, by trying each."""
    from itertools import permutations, product

    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    found = groups(net, torch.zeros(1, 1, 2, 2))
    generator = torch.Generator().manual_seed(0)
    base = layout()
    of = WeightLayout.of(net, "mlp", base.task)
    batch = WeightBatch(of, torch.randn(20, of.size, generator=generator))
    target = torch.randn(of.size, generator=generator)
    aligned = align(batch, target, groups=found)
    least = torch.full((20,), torch.inf)
    for order, flips in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        orders, signs = torch.tensor([order] * 20), torch.tensor([flips] * 20)
        tried = of.pack(permute(of.unpack(batch.vectors), found, [orders], [signs]))
        least = torch.minimum(least, (tried - target).norm(dim=1))
    assert torch.allclose(distance(aligned.batch, target), least)


def test_the_mean_reference_gathers_noisy_copies() -> None:
    """Scrambled copies with a little noise end around one network, as near as the noise lets them."""
    generator = torch.Generator().manual_seed(3)
    of = layout()
    centre = random_batch(of, 1, generator).vectors
    noise = 0.1 * centre.std() * torch.randn(30, of.size, generator=generator)
    copies = WeightBatch(of, centre + noise)
    batch = scrambled(copies, groups_of(of), generator)
    aligned = align(batch, seed=1)
    assert aligned.rounds < 10
    assert torch.allclose(
        torch.pdist(aligned.batch.vectors), torch.pdist(copies.vectors), atol=1e-4
    )
    assert torch.allclose(aligned.batch.vectors.mean(dim=0), aligned.reference, atol=1e-5)
    again = align(batch, seed=1)
    assert torch.equal(aligned.batch.vectors, again.batch.vectors), "the seed decides"


class Residual(nn.Module):
    """One stream, so that a tensor has the same group along two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Linear(5, 6), nn.Linear(6, 6)
        self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1)).tanh()
        x = x + self.one(x).tanh()
        return self.head(x + self.two(x).tanh())


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_residual_streams_align(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = Residual()
    found = groups(net, torch.zeros(1, 1, 1, 5))
    assert [group.size for group in found] == [6] and found[0].signs
    of = WeightLayout.of(net, "residual", layout().task)
    originals = WeightBatch(of, torch.randn(4, of.size, generator=generator))
    target = originals.vectors[0]
    back = align(scrambled(originals, found, generator), target, groups=found)
    assert torch.equal(back.batch.vectors[0], target)
    strangers = align(originals, target, groups=found)
    assert (distance(strangers.batch, target) <= distance(originals, target) * (1 + 1e-5)).all()


def test_real_networks_come_nearer_and_midpoints_improve(zoo: flown.Zoo) -> None:
    batch = zoo.select(epochs=[-1]).batch("digits")
    val = data.load("digits").val
    accuracy = partial(flown.evaluate, images=val.images, labels=val.labels)
    before, after = (spread(b, accuracy, pairs=40) for b in (batch, align(batch).batch))
    assert after.models == pytest.approx(before.models, abs=0.5)
    assert after.distance < 0.95 * before.distance
    assert after.midpoints > before.midpoints + 5


def test_an_aligned_zoo_keeps_rows_splits_and_functions(zoo: flown.Zoo, tmp_path: Path) -> None:
    aligned = align_zoo(zoo, tmp_path / "aligned", seed=2)
    keep = "task", "model", "seed", "epoch", "step", "split", "train_accuracy", "val_accuracy"
    rows = [[tuple(getattr(row, key) for key in keep) for row in z.rows] for z in (zoo, aligned)]
    assert rows[0] == rows[1] and aligned.layouts == zoo.layouts
    assert aligned.identity != zoo.identity
    assert aligned.about["recipes"] == zoo.about["recipes"]
    assert read_json(aligned.path / "zoo.json")["alignment"]["source"] == zoo.identity
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    old, new = zoo.batch("digits"), aligned.batch("digits")
    assert torch.allclose(old.logits(images), new.logits(images), atol=1e-4, rtol=1e-4)


def test_a_network_takes_one_order_at_all_its_epochs(zoo: flown.Zoo, tmp_path: Path) -> None:
    """So distances along a trajectory are what they were."""
    aligned = align_zoo(zoo, tmp_path / "aligned")
    for model in {row.model for row in zoo.rows}:
        places = [i for i, row in enumerate(zoo.rows) if row.model == model]
        old, new = (z.batch("digits").vectors[places] for z in (zoo, aligned))
        assert torch.allclose(torch.pdist(old), torch.pdist(new), atol=1e-4)
    reference = WeightBatch.load(aligned.path / "reference-digits.safetensors").vectors[0]
    for split in ("train", "held-out"):
        some = [z.select(split=split, epochs=[-1]).batch("digits") for z in (zoo, aligned)]
        before, after = (distance(batch, reference).mean() for batch in some)
        assert after < 0.95 * before


def test_held_out_networks_have_no_part_in_the_reference(zoo: flown.Zoo, tmp_path: Path) -> None:
    whole = align_zoo(zoo, tmp_path / "whole")
    training = align_zoo(zoo.select(split="train"), tmp_path / "training")
    one, other = (
        WeightBatch.load(z.path / "reference-digits.safetensors").vectors for z in (whole, training)
    )
    assert torch.equal(one, other)


def test_what_cannot_be_aligned_is_refused(zoo: flown.Zoo, tmp_path: Path) -> None:
    batch = zoo.batch("digits")
    with pytest.raises(FlownError, match=r"expected a reference \(2464,\)"):
        align(batch, torch.zeros(3))
    with pytest.raises(FlownError, match="no network"):
        align(batch[:0])
    with pytest.raises(FlownError, match="NaN"):
        align(WeightBatch(batch.layout, batch.vectors * torch.nan))
    with pytest.raises(FlownError, match="two networks"):
        spread(batch[:1], lambda b: torch.zeros(len(b)))
    with pytest.raises(FlownError, match="no network in `train`"):
        align_zoo(zoo.select(split="held-out"), tmp_path / "held-out")
    with pytest.raises(FlownError, match="choose another folder"):
        align_zoo(zoo, zoo.path, overwrite=True)
    assert Zoo.open(zoo.path).rows == zoo.rows
    align_zoo(zoo, tmp_path / "twice")
    with pytest.raises(FlownError, match="exists already"):
        align_zoo(zoo, tmp_path / "twice")
