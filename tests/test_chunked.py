"""The chunked VAE: one encoder for all chunks, each at its place; ResNet-20; the experiment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flown import encoders, nets
from flown.base.errors import FlownError
from flown.encoders import ChunkedConfig
from flown.experiments import chunked as experiment
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.weights.layout import JointLayout
from flown.zoo import Recipe
from flown.zoo.train.train import train_zoo
from tests import examples

JOINT = JointLayout.of([examples.layout()])  # 2,464 numbers


def build(chunk: int, **about: int) -> encoders.Chunked:
    config = ChunkedConfig(chunk=chunk, side=8, **about)
    made: encoders.Chunked = encoders.build(config, JOINT, JOINT.size)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(
    ("chunk", "count", "shape"),
    [
        (2464, 1, (4, 2, 2)),
        (5000, 1, (4, 2, 2)),
        (1000, 3, (4, 2, 2)),
        (500, 5, (4, 2, 4)),
        (308, 8, (4, 2, 4)),
        (131, 19, (4, 4, 6)),
    ],
)
def test_any_length_goes_there_and_back(chunk: int, count: int, shape: tuple[int, ...]) -> None:
    encoder, vectors = build(chunk), torch.randn(3, JOINT.size)
    assert encoder.chunks == count and encoder.latent_shape == shape
    latents = encoder.encode(vectors)
    assert latents.shape == (3, *shape)
    assert encoder.decode(latents).shape == vectors.shape


def test_each_chunk_has_its_tile() -> None:
    """What changes in one chunk changes one tile, and the other way round."""
    encoder, vectors = build(131), torch.randn(1, JOINT.size)
    latents = encoder.encode(vectors)
    decoded = encoder.decode(latents)
    seen = torch.zeros(4, 6)
    for k in range(encoder.chunks):
        place = torch.zeros(JOINT.size, dtype=torch.bool)
        place[131 * k : 131 * (k + 1)] = True
        moved = encoder.encode(torch.where(place, vectors + 1, vectors)) != latents
        tile = moved[0].any(dim=0)
        assert tile.sum() == 1, "side 8 and four levels: a tile is one pixel"
        seen += tile
        again = encoder.decode(torch.where(tile, latents + 1, latents)) != decoded
        assert again[0, place].any() and not again[0, ~place].any()
    assert seen.max() == 1 and (latents[0][:, seen == 0] == 0).all()


def test_position_matters() -> None:
    """Equal chunks at different places have different latents, equal latents different weights."""
    encoder = build(308)
    alike = torch.randn(1, 1, 308).expand(1, 8, 308).flatten(1)
    tiles = encoder.encode(alike).flatten(2)
    assert len(tiles[0].T[:8].unique(dim=0)) == 8
    chunks = encoder.decode(torch.ones(1, *encoder.latent_shape)).view(8, 308)
    assert len(chunks.unique(dim=0)) == 8
    with torch.no_grad():
        encoder.position_out.zero_()
    chunks = encoder.decode(torch.ones(1, *encoder.latent_shape)).view(8, 308)
    torch.testing.assert_close(chunks, chunks[:1].expand(8, -1))


def test_the_encoder_is_small_beside_one_for_the_whole() -> None:
    layout = examples.layout(net="resnet20")
    encoder = encoders.build(ChunkedConfig(), JointLayout.of([layout]), layout.size)
    assert layout.size > 250_000
    assert sum(p.numel() for p in encoder.parameters()) < 20 * layout.size
    assert encoder.latent_shape == (4, 16, 20)


def test_chunks_have_a_length() -> None:
    with pytest.raises(FlownError, match="chunk: Input should be greater than or equal to 1"):
        ChunkedConfig.parse({"chunk": 0})
    with pytest.raises(FlownError, match=r"chunked: side 12 is not divisible by 8"):
        encoders.build(ChunkedConfig(side=12), JOINT, JOINT.size)


@pytest.mark.parametrize(("channels", "classes", "count"), [(3, 10, 269_722), (1, 7, 269_239)])
def test_resnet20(channels: int, classes: int, count: int) -> None:
    net = nets.build("resnet20", channels, classes, "relu")
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.randn(2, channels, 32, 32)).shape == (2, classes)
    block, x = net[6].eval(), torch.randn(1, 16, 8, 8)  # the first to halve the image
    skip = torch.cat([x[:, :, ::2, ::2], torch.zeros(1, 16, 4, 4)], dim=1)
    h = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (h + skip).relu())


def test_a_lone_whole_network_is_split_by_time(tmp_path: Path) -> None:
    recipe = Recipe(
        name="late", dataset="digits", batch_size=32, epochs=1, keep=(), keep_steps=(1, 2, 3)
    )
    zoo = train_zoo(recipe, 1, tmp_path / "zoo", held_out=1 / 3, images=examples.images("digits"))
    assert [(row.step, row.split) for row in zoo.rows] == [
        (1, "train"),
        (2, "train"),
        (3, "held-out"),
    ]


@pytest.mark.slow
def test_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command on a small network with BatchNorm: within reach of the originals from noise."""
    images = examples.images("digits")

    def small(scale: str, seed: int) -> experiment.ChunkedExperiment:
        known = original("smoke", seed)
        brief = {"steps": 120, "batch_size": 8, "validate_every": 120, "learning_rate": 5e-3}
        fit = known.fit.model_copy(
            update={
                "encoder": ChunkedConfig(chunk=300, side=8),
                "encoder_training": TrainConfig(**brief),
                "flow_training": TrainConfig(**brief),
            }
        )
        about = {
            "net": "tests.examples:ConvNorm",
            "dataset": "digits",
            "size": 10,
            "epochs": 4,
            "keep_steps": tuple(range(20, 33, 2)),
            "learning_rate": 1e-2,
        }
        return known.model_copy(
            update={"recipe": known.recipe.model_copy(update=about), "fit": fit}
        )

    def load(name: str) -> ImageData:
        return images

    original = experiment.config
    monkeypatch.setattr(experiment, "config", small)
    monkeypatch.setattr(experiment.data, "load", load)
    result = experiment.chunked(tmp_path / "out", "smoke")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    found = {
        row["method"]: row["value"]
        for row in rows
        if row["metric"] == "accuracy" and row["selection"] == "all"
    }
    assert found["zoo"] > 30 and found["random-init"] < 25
    for method in ("flown", "reconstruction-train", "reconstruction-held-out"):
        assert found[method] > found["zoo"] - 10, found
    assert result.card.counts["digits"]["test"] == 50
    assert (tmp_path / "out" / "report.html").exists()
