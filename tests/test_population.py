"""Looking at a zoo: what is planted in it is found, what is not known is said to be unknown."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flown
from flown.base.errors import FlownError
from flown.report import population as reports
from flown.tasks import load
from flown.zoo import Zoo
from flown.zoo.inspect.activity import dead_in, dead_units
from flown.zoo.inspect.population import Population, Spread, describe, duplicates, networks
from flown.zoo.rows import Row, checksum, write_rows
from tests.examples import images, make_zoo
from tests.test_cli import call
from tests.test_report import Page

SECTIONS = [
    "In numbers",
    "Accuracy by epoch",
    "Accuracy, network by network",
    "Distances",
    "Directions",
    "Weights",
    "Dead units",
]
Tensors = dict[str, Tensor]


@pytest.fixture
def copy(zoo: flown.Zoo, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo.path, tmp_path / "zoo"))


def alter(path: Path, change: Callable[[Tensors], None], sums: bool = True) -> Zoo:
    """Changes the only shard of a zoo as if it had been written so."""
    zoo = Zoo.open(path)
    shard = path / zoo.rows[0].shard
    tensors = {name: tensor.clone() for name, tensor in load_file(shard).items()}
    change(tensors)
    save_file(tensors, shard)
    vectors = Zoo.open(path).raw(range(len(zoo)))
    rows = [
        row._replace(checksum=checksum(vector) if sums else None)
        for row, vector in zip(zoo.rows, vectors, strict=True)
    ]
    write_rows(path / "index.jsonl", rows)
    return Zoo.open(path)


def last(zoo: Zoo, split: str) -> list[int]:
    return [i for i, row in enumerate(zoo.rows) if row.split == split and row.epoch == 10]


def printed(population: Population) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    reports.print_population(population, console)
    return console.export_text()


def test_accuracies_are_those_of_the_index(zoo: flown.Zoo) -> None:
    task = describe(zoo).tasks[0]
    assert [(g.split, g.epoch, g.networks) for g in task.groups] == [
        ("train", 8, 10),
        ("train", 10, 10),
        ("held-out", 8, 2),
        ("held-out", 10, 2),
    ]
    values = torch.tensor([zoo.rows[i].val_accuracy for i in last(zoo, "train")])
    val = task.groups[1].val
    assert val is not None and val.n == 10
    assert val.mean == pytest.approx(float(values.mean()))
    assert val.std == pytest.approx(float(values.std()))
    assert (val.low, val.high) == pytest.approx((float(values.min()), float(values.max())))
    assert Spread.of([None, float("nan")]) is None
    single = Spread.of([None, 3.0])
    assert single is not None and single.std is None and single.mean == 3


def test_distances_are_torchs(zoo: flown.Zoo) -> None:
    vectors = zoo.read(range(len(zoo))).double()
    task = describe(zoo).tasks[0]
    train, held_out = vectors[last(zoo, "train")], vectors[last(zoo, "held-out")]
    expected = torch.pdist(train)
    d = task.distances
    assert torch.allclose(d.pairs.sort().values, expected.sort().values, rtol=1e-9)
    full = torch.cdist(train, train) + torch.eye(10) * 1e9
    assert torch.allclose(d.nearest.sort().values, full.amin(dim=1).sort().values, rtol=1e-6)
    across = torch.stack([(train - h).norm(dim=1).min() for h in held_out])
    assert torch.allclose(d.held_out.sort().values, across.sort().values, rtol=1e-9)
    assert task.norm is not None and task.norm.mean == pytest.approx(
        float(train.norm(dim=1).mean())
    )
    assert task.size == (zoo.path / zoo.rows[0].shard).stat().st_size and task.shards == 1


def test_a_sample_is_drawn_by_its_seed(zoo: flown.Zoo) -> None:
    few = [describe(zoo, sample=3, seed=seed).tasks[0] for seed in (0, 0, 1)]
    assert [len(task.distances.pairs) for task in few] == [3, 3, 3]
    assert torch.equal(few[0].distances.pairs, few[1].distances.pairs)
    assert not torch.equal(few[0].distances.pairs, few[2].distances.pairs)
    assert few[0].looked == 2 * (3 + 2), "both epochs of three training and two held-out networks"
    with pytest.raises(FlownError, match="2 networks at least"):
        describe(zoo, sample=1)


@pytest.mark.parametrize("sums", [True, False])
def test_a_planted_duplicate_is_found(copy: Path, sums: bool) -> None:
    here = Zoo.open(copy)
    assert duplicates(here, "digits") == ()
    a, b = here.rows[last(here, "train")[4]], here.rows[last(here, "held-out")[1]]

    def plant(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor[b.offset] = tensor[a.offset]

    zoo = alter(copy, plant, sums)
    population = describe(zoo)
    assert [{(r.model, r.epoch) for r in rows} for rows in population.tasks[0].duplicates] == [
        {(a.model, 10), (b.model, 10)}
    ]
    assert float(population.tasks[0].distances.held_out.min()) == 0
    said = printed(population)
    assert "1 group in training and held-out at once" in said
    assert f"model {a.model} (seed {a.seed}, epoch 10, train)" in said


def test_equal_checksums_are_not_enough(copy: Path) -> None:
    zoo = Zoo.open(copy)
    write_rows(copy / "index.jsonl", [row._replace(checksum=1) for row in zoo.rows])
    assert duplicates(Zoo.open(copy), "digits") == ()


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_a_planted_dead_unit_is_found(copy: Path, bias: float) -> None:
    before = describe(Zoo.open(copy)).tasks[0].dead
    here = Zoo.open(copy)
    row = here.rows[last(here, "train")[6]]

    def plant(tensors: Tensors) -> None:
        tensors["3.weight"][row.offset, 2] = 0
        tensors["3.bias"][row.offset, 2] = bias

    zoo = alter(copy, plant)
    after = describe(zoo).tasks[0].dead
    assert before is not None and after is not None
    assert [layer.name for layer in after] == ["0", "3", "6", "9"]
    assert [layer.units for layer in after] == [8, 6, 4, 20]
    more = {x.name: x.dead - y.dead for x, y in zip(after, before, strict=True)}
    assert more["3"] == pytest.approx(100 / 6 / 10) and more["0"] == 0
    batch = zoo.batch("digits")[
        [zoo.rows.index(next(r for r in zoo.rows if r.offset == row.offset))]
    ]
    val = load("digits").val.images
    mask = dead_in(batch.module(0), batch.preprocess(val))["3"]
    assert mask.tolist() == [False, False, True, False, False, False]
    assert dead_units(batch, val[:20])[1].dead == pytest.approx(100 / 6)


def test_units_are_looked_at_after_their_activation() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.fill_(0.5)
            layer.bias.copy_(torch.linspace(-9, 0, len(layer.bias)))
    x = torch.linspace(0, 2, 30).reshape(10, 3)
    found = dead_in(net, x)  # the first layer's sums lie in 0..3, its biases at -9, -6, -3 and 0
    assert found["0"].tolist() == [True, True, True, False]
    assert found["2"].tolist() == [False] * 5 and set(found) == {"0", "2"}
    assert not any(module._forward_hooks for module in net)


def test_nan_is_counted_and_named(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Zoo.open(copy)
    bad = [here.rows[last(here, "train")[1]], here.rows[last(here, "held-out")[0]]]

    def plant(tensors: Tensors) -> None:
        tensors["9.bias"][bad[0].offset, 3] = float("nan")
        tensors["0.bias"][bad[1].offset, 0] = float("-inf")

    zoo = alter(copy, plant)
    for everything in (False, True):
        task = describe(zoo, everything=everything).tasks[0]
        assert {row.offset for row in task.broken} == {row.offset for row in bad}
        assert len(task.distances.nearest) == 9 and len(task.distances.held_out) == 1
        assert torch.isfinite(task.distances.pairs).all()
        assert task.plane is not None and torch.isfinite(task.plane.points).all()
        assert task.looked == 24
    few = describe(zoo, sample=2, everything=True).tasks[0]
    assert len(few.broken) == 2 and few.looked == 24
    assert call(monkeypatch, "zoo", "inspect", copy) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "24 of 24 checkpoints read, 2 hold NaN or Inf" in said
    for row in bad:
        assert f"NaN or Inf: model {row.model} (seed {row.seed}, epoch 10, {row.split})" in said
    assert call(monkeypatch, "zoo", "inspect", copy, "--verify") == 1
    assert capsys.readouterr().out.count("holds NaN or Inf") == 2


def test_verify_names_a_flipped_byte(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "zoo", "inspect", copy, "--verify") == 0
    assert "24 checkpoints read, all as written" in capsys.readouterr().out
    shard = copy / Zoo.open(copy).rows[0].shard
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert call(monkeypatch, "zoo", "inspect", copy) == 0, "looks at what is there"
    capsys.readouterr()
    assert call(monkeypatch, "zoo", "inspect", copy, "--verify") == 1
    captured = capsys.readouterr()
    damage = [line for line in captured.out.splitlines() if "is not what was written" in line]
    assert len(damage) == 1 and str(shard) in damage[0]
    assert "all as written" not in captured.out and "Traceback" not in captured.err


def test_verify_names_a_missing_shard(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = copy / Zoo.open(copy).rows[0].shard
    shard.unlink()
    assert call(monkeypatch, "zoo", "inspect", copy, "--verify") == 1
    assert f"{shard}: no such file; the index names 24 of its rows" in capsys.readouterr().out
    assert call(monkeypatch, "zoo", "inspect", copy) == 2
    captured = capsys.readouterr()
    assert f"{shard}: no such file" in captured.err
    assert "held-out, 10" in captured.out, "the index is shown all the same"


def test_verify_compares_index_and_shards(copy: Path) -> None:
    rows = list(Zoo.open(copy).rows)
    shard, spare = copy / rows[0].shard, copy / "weights-spare.safetensors"
    write_rows(copy / "index.jsonl", [*rows[:-2], rows[-1]._replace(offset=24)])
    shutil.copy(shard, spare)
    assert Zoo.open(copy).verify() == [
        f"{shard}: has 24 rows, 1 that the index names lie beyond them",
        f"{shard}: no row of the index names 2 of its 24 rows, row {rows[-2].offset} the first",
        f"{spare}: no row of the index names it",
    ]
    spare.unlink()
    write_rows(copy / "index.jsonl", rows)
    assert Zoo.open(copy).verify() == []
    assert Zoo.open(copy).select(epochs=[-1]).verify() == [], "other rows are not superfluous"


def test_the_report_is_one_file(
    zoo: flown.Zoo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "zoo.html"
    assert call(monkeypatch, "zoo", "inspect", zoo.path, "--report", out) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and not {"script", "link"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert page.headings == SECTIONS
    for source in page.loads:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        assert min(Image.open(io.BytesIO(base64.b64decode(content))).size) > 200
    assert len(page.loads) >= 5 and "24 of 24 checkpoints read, all finite" in text
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.html"]
    assert call(monkeypatch, "zoo", "inspect", zoo.path, "--report", out) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_report_never_replaces_a_folder(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "zoo", "inspect", copy, "--report", copy, "--overwrite") == 2
    assert "a folder; name a file" in capsys.readouterr().err
    assert Zoo.open(copy).verify() == []


def test_what_is_unknown_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_zoo(tmp_path / "zoo", ("digits", "turned"), models=5)
    rows = [row._replace(train_accuracy=None, val_accuracy=None) for row in made.rows]
    write_rows(made.path / "index.jsonl", rows)
    out = tmp_path / "zoo.html"
    assert call(monkeypatch, "zoo", "inspect", made.path, "--report", out) == 0
    said = capsys.readouterr().out
    assert said.count("unknown") >= 2 * 4 * 2 and "unknown (data not here)" in said
    page = Page(text := out.read_text(encoding="utf-8"))
    assert page.headings == SECTIONS
    assert "No validation accuracy is known." in text and "turned: data not here" in text
    task = describe(Zoo.open(made.path)).tasks[1]
    assert task.dead is None and task.groups[0].val is None
    given = describe(Zoo.open(made.path), images={"turned": images("turned")}).tasks[1]
    assert given.dead is not None and "100 validation images" in given.dead_note


def test_a_zoo_of_one_network_and_split(tmp_path: Path) -> None:
    """Nothing to compare with: no distance, no plane, and still a report."""
    made = make_zoo(tmp_path / "zoo", ("turned",), models=2, held_out=0)
    write_rows(made.path / "index.jsonl", [made.rows[0]])
    zoo = Zoo.open(made.path)
    task = (population := describe(zoo)).tasks[0]
    assert not len(task.distances.pairs) and not len(task.distances.nearest)
    assert task.plane is None and task.checkpoints == 1
    reports.write_population(tmp_path / "zoo.html", zoo, population)
    assert Page((tmp_path / "zoo.html").read_text(encoding="utf-8")).headings == SECTIONS
    assert "unknown" in printed(population)


def test_networks_come_with_their_epochs_in_order(zoo: flown.Zoo) -> None:
    found = networks(zoo, "digits", "train")
    assert len(found) == 10
    for places in found:
        rows: list[Row] = [zoo.rows[place] for place in places]
        assert [row.epoch for row in rows] == [8, 10] and len({row.model for row in rows}) == 1
