"""Statistics of a zoo: accuracies, distances, duplicates, dead units, bytes.

    pairs    |w_i - w_j|             over pairs i < j of training networks, each at its last epoch
    nearest  min_j |w_i - w_j|       of a training network i != j, or of a held-out one
    dead     max_x a_u(x) - min_x a_u(x) <= 1e-6 max_x |a_u(x)|      unit u, images x

A zoo may be larger than the memory. Statistics of weights are measured on a sample of its networks,
drawn by a seed; duplicates are found by the checksums in the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flown import tasks as data
from flown.base.errors import FlownError
from flown.tasks import ImageData
from flown.weights.batch import WeightBatch
from flown.weights.geometry import distances, principal
from flown.weights.layout import WeightLayout
from flown.zoo.inspect.activity import Layer, dead_units
from flown.zoo.rows import Row, checksum
from flown.zoo.store import Zoo

SPLITS = ("train", "held-out")
SAMPLE = 200  # networks of a split in the sample
_NUMBERS = 1 << 25  # weights of a sample: large networks are sampled more thinly
_CHUNK = 1 << 22  # weights read at a time where all are read
_CHECKPOINTS, _EPOCHS = 600, 24  # in the plane
_NETWORKS, _IMAGES = 32, 256  # on which units are tested
_BINS = 60
_NEIGHBOURS = 1 / 3  # a held-out network's distance to training, of that of two training networks


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (None of a single value) and range of n values."""

    n: int
    mean: float
    std: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """The spread of the known values; None without any."""
        known = [v for v in values if v is not None and math.isfinite(v)]
        if not known:
            return None
        x = torch.tensor(known, dtype=torch.double)
        std = float(x.std()) if len(x) > 1 else None
        return cls(len(x), float(x.mean()), std, float(x.min()), float(x.max()))


@dataclass(frozen=True)
class Group:
    """The checkpoints of one split and epoch; accuracies in percent, None where unknown."""

    split: str
    epoch: float
    networks: int
    train: Spread | None
    val: Spread | None


@dataclass(frozen=True)
class Distances:
    """L2 distances of sampled networks, each at its last epoch; m training and h held-out ones."""

    pairs: Tensor  # (m (m - 1) / 2,), in the order of `torch.pdist`
    nearest: Tensor  # (m,) of a training network to the nearest other one; none where m = 1
    held_out: Tensor  # (h,) of a held-out network to the nearest training network

    @property
    def are_neighbours(self) -> bool:
        """Whether held-out networks lie far nearer to a training network than two of these do.

        Then they are steps of the same trainings, and nothing that is measured on them means much.
        """
        if not len(self.held_out) or not len(self.pairs):
            return False
        return bool(self.held_out.median() < _NEIGHBOURS * self.pairs.median())


@dataclass(frozen=True)
class Plane:
    """Checkpoints in the two directions in which the sample's weights differ most."""

    rows: tuple[Row, ...]
    points: Tensor  # (n, 2)
    explained: tuple[float, float]  # percent of the variance


@dataclass(frozen=True)
class Histogram:
    """The weights of one tensor over the sampled training networks, up to four deviations out."""

    name: str
    mean: float
    std: float
    edges: tuple[float, float]
    counts: Tensor  # (bins,)


@dataclass(frozen=True)
class TaskPopulation:
    """One task's networks."""

    task: str
    net: str
    weights: int  # D
    checkpoints: int
    shards: int
    size: int  # bytes on disk of the shards that are there
    groups: tuple[Group, ...]
    looked: int  # checkpoints that were read for NaN and Inf
    broken: tuple[Row, ...]  # checkpoints with NaN or Inf; nothing else is measured on them
    norm: Spread | None
    distances: Distances
    duplicates: tuple[tuple[Row, ...], ...]  # checkpoints whose weights are the same to the bit
    dead: tuple[Layer, ...] | None
    dead_note: str  # what `dead` was measured on, or why it is None
    plane: Plane | None
    histograms: tuple[Histogram, ...]


@dataclass(frozen=True)
class Population:
    """All of a zoo."""

    path: Path
    tasks: tuple[TaskPopulation, ...]


def describe(
    zoo: Zoo,
    *,
    sample: int = SAMPLE,
    images: Mapping[str, ImageData] | None = None,
    everything: bool = False,
    seed: int = 0,
) -> Population:
    """Looks at a zoo.

    Args:
        sample: networks of each split and task whose weights are read; fewer where networks are
            large.
        images: by task; images of other tasks are loaded unless that needs a download.
        everything: look for NaN and Inf in every checkpoint, not in the sample alone.
        seed: of the sample.

    Raises:
        FlownError: a sample below 2, or a shard that is missing, broken or of another layout.
    """
    if sample < 2:
        raise FlownError(f"describe: needs a sample of 2 networks at least, got {sample}")
    return Population(
        zoo.path,
        tuple(_task(zoo, task, sample, images or {}, everything, seed) for task in zoo.tasks),
    )


def sampled_distances(zoo: Zoo, task: str, sample: int = SAMPLE, seed: int = 0) -> Distances:
    """Distances between a task's networks, or a sample of them, each at its last epoch."""
    limit, generator = _limit(zoo, task, sample), torch.Generator().manual_seed(seed)
    ends = [[p[-1] for p in _some(networks(zoo, task, x), limit, generator)] for x in SPLITS]
    return _distances(*(zoo.raw(places) if places else torch.empty(0, 1) for places in ends))


def groups(zoo: Zoo, task: str) -> tuple[Group, ...]:
    """A task's checkpoints by split and epoch, from the index alone."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in zoo.rows:
        if row.task == task:
            found.setdefault((row.split, row.epoch), []).append(row)
    order = sorted(found, key=lambda key: (key[0] != SPLITS[0], *key))
    return tuple(
        Group(
            split,
            epoch,
            len(found[split, epoch]),
            Spread.of([row.train_accuracy for row in found[split, epoch]]),
            Spread.of([row.val_accuracy for row in found[split, epoch]]),
        )
        for split, epoch in order
    )


def networks(zoo: Zoo, task: str, split: str) -> list[list[int]]:
    """The places in `zoo.rows` of each network's checkpoints, from its first epoch to its last."""
    found: dict[int, list[int]] = {}
    for place, row in enumerate(zoo.rows):
        if row.task == task and row.split == split:
            found.setdefault(row.model, []).append(place)
    return [sorted(places, key=lambda p: zoo.rows[p].epoch) for places in found.values()]


def duplicates(zoo: Zoo, task: str) -> tuple[tuple[Row, ...], ...]:
    """Checkpoints of a task whose weights are the same to the bit, group by group.

    Candidates share a checksum, which is computed for rows without one; then weights are compared.

    Raises:
        FlownError: as `Zoo.raw`.
    """
    places, size = zoo.places[task], zoo.layout(task).size
    sums: dict[int, list[int]] = {}
    for place in places:
        known = zoo.rows[place].checksum
        if known is not None:
            sums.setdefault(known, []).append(place)
    for chunk in _chunks([p for p in places if zoo.rows[p].checksum is None], size):
        for place, vector in zip(chunk, zoo.raw(chunk), strict=True):
            sums.setdefault(checksum(vector), []).append(place)
    found: list[tuple[Row, ...]] = []
    for alike in sums.values():
        if len(alike) == 1:
            continue
        same: dict[bytes, list[Row]] = {}  # bytes, not numbers: NaN equals itself
        for chunk in _chunks(alike, size):
            for place, vector in zip(chunk, zoo.raw(chunk), strict=True):
                same.setdefault(vector.numpy().tobytes(), []).append(zoo.rows[place])
        found += [tuple(rows) for rows in same.values() if len(rows) > 1]
    return tuple(found)


def _task(
    zoo: Zoo,
    name: str,
    sample: int,
    images: Mapping[str, ImageData],
    everything: bool,
    seed: int,
) -> TaskPopulation:
    layout = zoo.layout(name)
    limit = _limit(zoo, name, sample)
    places, generator = zoo.places[name], torch.Generator().manual_seed(seed)
    train, held_out = (_some(networks(zoo, name, x), limit, generator) for x in SPLITS)
    paths = _paths(zoo, _alternate(train, held_out), _NUMBERS // layout.size)
    looked = sorted({p[-1] for p in (*train, *held_out)} | set(paths))
    vectors = zoo.raw(looked)
    finite = torch.isfinite(vectors).all(dim=1).tolist()
    at = {place: i for i, place in enumerate(looked) if finite[i]}
    if everything:
        broken, looked = _not_finite(zoo, places, layout.size), places
    else:
        broken = [place for place in looked if place not in at]
    ends = [vectors[[at[p[-1]] for p in part if p[-1] in at]] for part in (train, held_out)]
    dead, note = _dead(name, WeightBatch(layout, ends[0][:_NETWORKS]), images)
    shards = {zoo.path / zoo.rows[place].shard for place in places}
    shown = [place for place in paths if place in at]
    return TaskPopulation(
        task=name,
        net=layout.net,
        weights=layout.size,
        checkpoints=len(places),
        shards=len(shards),
        size=sum(x.stat().st_size for x in shards if x.is_file()),
        groups=groups(zoo, name),
        looked=len(looked),
        broken=tuple(zoo.rows[place] for place in broken),
        norm=Spread.of(ends[0].norm(dim=1).tolist()),
        distances=_distances(*ends),
        duplicates=duplicates(zoo, name),
        dead=dead,
        dead_note=note,
        plane=_plane([zoo.rows[p] for p in shown], vectors[[at[p] for p in shown]]),
        histograms=_histograms(layout, ends[0]),
    )


def _limit(zoo: Zoo, task: str, sample: int) -> int:
    return max(2, min(sample, _NUMBERS // zoo.layout(task).size))


def _chunks(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    step = max(1, _CHUNK // size)
    return (places[start : start + step] for start in range(0, len(places), step))


def _not_finite(zoo: Zoo, places: Sequence[int], size: int) -> list[int]:
    found = []
    for chunk in _chunks(places, size):
        finite = torch.isfinite(zoo.raw(chunk)).all(dim=1).tolist()
        found += [place for place, fine in zip(chunk, finite, strict=True) if not fine]
    return found


def _some(items: list[list[int]], count: int, generator: torch.Generator) -> list[list[int]]:
    order = torch.randperm(len(items), generator=generator)[:count].tolist()
    return [items[i] for i in order]


def _alternate(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    """Items of both in turn, so that the first few hold some of each."""
    common = min(len(a), len(b))
    both = [item for pair in zip(a, b, strict=False) for item in pair]
    return both + a[common:] + b[common:]


def _paths(zoo: Zoo, chosen: list[list[int]], limit: int) -> list[int]:
    """The places of whole networks, as many as fit; of long trainings only some epochs."""
    epochs = sorted({zoo.rows[place].epoch for places in chosen for place in places})
    marks = torch.linspace(0, len(epochs) - 1, min(_EPOCHS, len(epochs))).round().int().tolist()
    kept, found = {epochs[mark] for mark in marks}, list[int]()
    for places in chosen:
        path = [place for place in places if zoo.rows[place].epoch in kept or place == places[-1]]
        if len(found) + len(path) > min(_CHECKPOINTS, limit):
            break
        found += path
    return found


def _distances(train: Tensor, held_out: Tensor) -> Distances:
    """Distances of training networks (m, D) and held-out networks (h, D)."""
    m = len(train)
    among, across = distances(train, train), distances(held_out, train)
    pairs = among[tuple(torch.triu_indices(m, m, 1))]
    others = among.fill_diagonal_(torch.inf)
    return Distances(
        pairs,
        others.amin(dim=1) if m > 1 else others.new_empty(0),
        across.amin(dim=1) if m else across.new_empty(0),
    )


def _plane(rows: list[Row], vectors: Tensor) -> Plane | None:
    """Principal components of (n, D); None for too few."""
    found = principal(vectors) if len(rows) > 2 else None
    if found is None:
        return None
    first, second = found.explained.tolist()
    return Plane(tuple(rows), found.project(vectors).double(), (first, second))


def _histograms(layout: WeightLayout, vectors: Tensor) -> tuple[Histogram, ...]:
    """A histogram for every tensor of networks (n, D)."""
    found = []
    for name, tensor in layout.unpack(vectors).items() if len(vectors) else ():
        mean, std = float(tensor.mean()), float(tensor.std(correction=0))
        low = max(float(tensor.min()), mean - 4 * std)
        high = min(float(tensor.max()), mean + 4 * std)
        if not low < high:  # all weights are one number
            low, high = low - 0.5, low + 0.5
        counts = torch.histc(tensor.float(), _BINS, low, high)
        found.append(Histogram(name, mean, std, (low, high), counts))
    return tuple(found)


def _dead(
    task: str, batch: WeightBatch, given: Mapping[str, ImageData]
) -> tuple[tuple[Layer, ...] | None, str]:
    """Dead units of networks and what they were measured on, or None and the reason."""
    if not len(batch):
        return None, "no network to look at"
    try:
        if task not in given and not _is_here(task):
            return None, "data not here"
        val = (given[task] if task in given else data.load(task)).val
        sample = torch.linspace(0, len(val) - 1, min(_IMAGES, len(val))).round().long()
        layers = dead_units(batch, val.images[sample])
    except (FlownError, RuntimeError) as error:  # a user's network may not run on these images
        return None, str(error).partition("\n")[0]
    return layers, f"{len(batch)} networks, {len(sample)} validation images"


def _is_here(task: str) -> bool:
    """Whether a data set of that name can be loaded without downloading it."""
    return any(source.name == task and source.present for source in data.available())
