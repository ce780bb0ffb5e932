"""An aligned copy of a zoo, and how near its networks are to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import save_tensors
from flown.base.run import Run
from flown.weights import construction
from flown.weights.batch import WeightBatch
from flown.zoo.align.matching import Aligned, align, permute
from flown.zoo.rows import Row, checksum
from flown.zoo.store import Zoo


@dataclass(frozen=True)
class Spread:
    """Distances between networks and the accuracy of points between them, in percent.

    `distance` is the mean over all pairs; `midpoints` the mean accuracy of (w_i + w_j) / 2 over random
    pairs, `mean` the accuracy of the mean of all networks, `models` the mean accuracy of the
    networks.
    """

    distance: float
    models: float
    midpoints: float
    mean: float


@torch.no_grad()
def spread(
    batch: WeightBatch, accuracy: Callable[[WeightBatch], Tensor], pairs: int = 100, seed: int = 0
) -> Spread:
    """Measures networks. The same seed takes the same pairs, so zoos before and after compare.

    Args:
        accuracy: computes the accuracy of every network (n,) in percent, on validation images.

    Raises:
        FlownError: fewer than two networks or no pair.
    """
    n, vectors = len(batch), batch.vectors
    if n < 2 or pairs < 1:
        raise FlownError(f"spread: needs two networks and a pair, got {n} and {pairs}")
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(n, (pairs,), generator=generator)
    j = (i + torch.randint(1, n, (pairs,), generator=generator)) % n
    middle = WeightBatch(batch.layout, (vectors[i] + vectors[j]) / 2)
    mean = WeightBatch(batch.layout, vectors.mean(dim=0, keepdim=True))
    return Spread(
        distance=float(torch.pdist(vectors).mean()),
        models=float(accuracy(batch).mean()),
        midpoints=float(accuracy(middle).mean()),
        mean=float(accuracy(mean)[0]),
    )


def align_zoo(
    zoo: Zoo, out: Path | str, *, rounds: int = 50, seed: int = 0, overwrite: bool = False
) -> Zoo:
    """Writes an aligned copy of a zoo, task by task; rows, splits and accuracies stay.

    The reference is the mean of the training networks at their last epoch; held-out networks are
    brought into its order, but do not contribute to it. All checkpoints of a network take the order
    of its last one, so that its trajectory stays continuous. `reference-<k>.safetensors` holds the
    mean for the k-th task.

    Raises:
        FlownError: `out` exists or is the zoo itself, a task without training networks, or a network
            without known symmetries.
    """
    if Path(out).resolve() == zoo.path.resolve():
        raise FlownError(f"{out}: is the zoo to be aligned; choose another folder")
    run = Run(
        out,
        {"alignment": zoo.identity},
        resume=False,
        overwrite=overwrite,
        file="progress.json",
        sources=[zoo.path],
    )
    out = run.path
    run.begin()
    rows: list[Row] = []
    about: dict[str, int] = {}
    for number, task in enumerate(zoo.tasks):
        members = [zoo.rows[place] for place in zoo.places[task]]
        batch = zoo.batch(task)
        layout = batch.layout
        if shared := construction.constants(batch.network).keys() & batch.frozen.keys():
            raise FlownError(
                f"{zoo.path}: networks for task '{task}' share buffer '{min(shared)}', which a "
                "permutation of one network might have to change"
            )
        aligned, owner = _align_rows(batch, members, rounds, seed, str(zoo.path))
        orders = [p[owner] for p in aligned.permutations]
        flips = [s[owner] for s in aligned.signs]
        tensors = permute(layout.unpack(batch.vectors), aligned.groups, orders, flips)
        # The name differs from the source's, because the rows make a zoo's identity.
        shard = f"weights-aligned-{len(rows):06d}.safetensors"
        save_tensors(out / shard, tensors)
        reference = WeightBatch(
            layout, aligned.reference[None], {"mean of": str(zoo.path)}, task=batch.task
        )
        reference.save(out / f"reference-{number}.safetensors")
        about[task] = aligned.rounds
        sums = map(checksum, layout.pack(tensors))
        rows += [
            row._replace(shard=shard, offset=i, checksum=known)
            for i, (row, known) in enumerate(zip(members, sums, strict=True))
        ]
    alignment = {"source": zoo.identity, "seed": seed, "rounds": about}
    kept = {key: value for key, value in zoo.about.items() if key not in ("format", "layouts")}
    made = Zoo.write(out, zoo.layouts, zoo.tasks.values(), rows, {**kept, "alignment": alignment})
    run.file.unlink()
    return made


def _align_rows(
    batch: WeightBatch, rows: Sequence[Row], rounds: int, seed: int, where: str
) -> tuple[Aligned, Tensor]:
    """Aligns the last checkpoint of every network; also returns each row's network."""
    last = {row.model: i for i, row in sorted(enumerate(rows), key=lambda item: item[1].epoch)}
    training = [i for i in last.values() if rows[i].split == "train"]
    if not training:
        raise FlownError(f"{where}: {batch.name}: has no network in `train`")
    fitted = align(batch[training], rounds=rounds, seed=seed)
    aligned = align(batch[list(last.values())], fitted.reference, groups=fitted.groups)
    places = {model: place for place, model in enumerate(last)}
    owner = torch.tensor([places[row.model] for row in rows])
    return replace(aligned, rounds=fitted.rounds), owner
