"""Table 1 (FLoWN 3.1): unconditional generation, beside the original networks and p-diff.

Whole `cnn-medium`: ten trainings, 25 late checkpoints of each. The 200 checkpoints of eight are the
originals, which the generators learn; two trainings are held out. The paper keeps 200 checkpoints of
one training (Table 8), but then nothing in the table would tell a generator from an average: with
several trainings an average is at chance, and an independent training gives the unit of novelty.
Adam at a constant 1e-3, the rate at which the paper keeps checkpoints, from PyTorch's
initialisation; without the recipes' weight decay, which is added to the gradient and at this rate
ends training.

The last two norm layers of ResNet-18, ViT-base and ConvNeXt-tiny: one training each, as p-diff's,
the last checkpoints held out. STL-10 is used if its data is installed; otherwise `natural10` takes
its place under its own name. CIFAR-100 is left out if it is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flown.base.provenance import Row, write_results
from flown.context.tokens import ContextConfig
from flown.encoders import GraphConfig, VAEConfig
from flown.experiments.begin import begin
from flown.experiments.retrieval import present
from flown.experiments.unconditional import Cell, Unconditional, UnconditionalConfig, run
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.report import Section, write_report
from flown.report.style import style_of
from flown.training import TrainConfig
from flown.zoo import Recipe, recipe

# For a CPU, and as published. Subsets of networks use the VAE alone, as in the paper.
ENCODERS: dict[str, tuple[Any, Any]] = {
    "vae": (VAEConfig(), VAEConfig.published()),
    "graph": (GraphConfig(), GraphConfig.published()),
}

# Original, FLoWN, p-diff: best validation accuracy; None where the text lost a cell.
_PAPER: dict[tuple[str, str], dict[str, tuple[float | None, float | None, float | None]]] = {
    ("resnet18", "vae"): {
        "cifar100": (71.45, None, 71.40),
        "cifar10": (94.54, None, 94.36),
        "mnist": (None, 99.65, None),
        "stl10": (62.00, 62.00, 62.24),
    },
    ("vit_base", "vae"): {
        "cifar100": (85.95, None, 85.85),
        "cifar10": (98.20, None, 98.12),
        "mnist": (None, 99.38, None),
        "stl10": (96.15, 95.77, 95.80),
    },
    ("convnext_tiny", "vae"): {
        "cifar100": (85.06, None, 85.17),
        "cifar10": (98.03, None, 97.90),
        "mnist": (None, 99.41, None),
        "stl10": (95.95, 95.63, 95.63),
    },
    ("cnn-medium", "vae"): {
        "cifar100": (32.09, 31.36, 30.67),
        "cifar10": (72.53, 69.97, 69.18),
        "mnist": (98.93, 98.91, None),
        "stl10": (53.88, 53.50, 53.86),
    },
    ("cnn-medium", "graph"): {
        "cifar100": (32.09, 31.73, 31.81),
        "cifar10": (72.53, 72.15, 72.09),
        "mnist": (98.93, 98.89, None),
        "stl10": (53.88, 53.64, 53.80),
    },
}
METHODS = ("zoo", "flown", "p-diff")
PAPER = {
    (net, encoder, dataset, method): value
    for (net, encoder), datasets in _PAPER.items()
    for dataset, values in datasets.items()
    for method, value in zip(METHODS, values, strict=True)
}

# Steps of each training at the cpu scale; ten trainings share two cores.
_STEPS = {"mnist": 3000, "cifar10": 4500, "cifar100": 4500, "stl10": 2500, "natural10": 2500}
_SUBSETS: dict[str, tuple[str, ...]] = {
    "smoke": (),
    "cpu": ("cifar10-resnet18-norms", "cifar10-vit_base-norms", "cifar10-convnext_tiny-norms"),
    "paper": tuple(
        f"{dataset}-{net}-norms"
        for net in ("resnet18", "vit_base", "convnext_tiny")
        for dataset in ("cifar100", "cifar10", "mnist", "stl10")
    ),
}


def config(scale: str, seed: int = 0) -> UnconditionalConfig:
    """The experiment at a scale; `paper` has the published sizes and is meant for a GPU."""
    available = present()
    datasets = ["mnist", "cifar10", "stl10" if "stl10" in available else "natural10"]
    datasets += ["cifar100"] if "cifar100" in available else []
    if scale == "smoke":
        return UnconditionalConfig(
            cells=(whole("vae", datasets[0], scale, seed),), steps=10, ddpm_steps=50, seed=seed
        )
    cells = [whole(encoder, dataset, scale, seed) for encoder in ENCODERS for dataset in datasets]
    limits: dict[str, Any] = {"samples": 20, "images": 1000} if scale == "cpu" else {}
    cells += [
        subset(x, scale, seed, **limits) for x in _SUBSETS[scale] if x.split("-")[0] in available
    ]
    return UnconditionalConfig(cells=tuple(cells), seed=seed)


def whole(encoder: str, dataset: str, scale: str, seed: int) -> Cell:
    """`cnn-medium` on a data set."""
    last, smoke = _STEPS[dataset], scale == "smoke"
    changes: dict[str, dict[str, Any]] = {
        "smoke": {},
        # Steps, not epochs: the budget does not depend on the number of images.
        "cpu": {"epochs": 200, "keep": (), "keep_steps": tuple(range(last - 960, last + 1, 40))},
        "paper": {"epochs": 100, "keep": tuple(range(76, 101)), "batch_size": 128},
    }
    how = recipe(f"{dataset}-medium", scale)
    how = how.model_copy(
        update={"init": "default", "learning_rate": 1e-3, "weight_decay": 0.0, **changes[scale]}
    )
    return Cell(
        recipe=how,
        models=4 if smoke else 10,
        fit=_fit(encoder, how, scale, seed),
        samples=10 if smoke else 100,
    )


def subset(name: str, scale: str, seed: int, **limits: Any) -> Cell:
    """The last two norm layers of a larger network; for a CPU, on small images and few of them."""
    how = recipe(name, scale)
    if scale == "cpu":
        small: dict[str, Any] = {"keep_steps": tuple(range(5, 151, 5)), "max_train_images": 3000}
        if how.net == "resnet18":
            small |= {"size": 16}
        if how.net == "vit_base":
            small |= {"max_train_images": 1000, "epochs": 10, "base_epochs": 3}
        how = how.model_copy(update=small)
    return Cell(recipe=how, models=1, fit=_fit("vae", how, scale, seed), **limits)


def _fit(kind: str, how: Recipe, scale: str, seed: int) -> FlownConfig:
    """All kept checkpoints, no context; the same budget for the flow and for p-diff."""
    kept = len(how.keep) + len(how.keep_steps)
    small, published = ENCODERS[kind]
    shared: dict[str, Any] = {
        "epochs": tuple(range(-kept, 0)),
        "seed": seed,
        "context": ContextConfig(mode="none"),
    }
    if scale == "paper":
        return FlownConfig(
            encoder=published,
            encoder_training=TrainConfig(steps=40_000, batch_size=50),
            velocity=VelocityConfig(channels=128),
            flow_training=TrainConfig(steps=40_000, batch_size=50),
            **shared,
        )
    smoke = scale == "smoke"
    # A step of the graph encoder takes as long as five of the VAE's.
    steps, batch_size = (600, 16) if kind == "graph" else (1500, 32)
    return FlownConfig(
        encoder=small,
        encoder_training=TrainConfig(
            steps=60 if smoke else steps,
            batch_size=batch_size,
            learning_rate=2e-3,
            validate_every=steps // 3,
        ),
        velocity=VelocityConfig(channels=32, blocks=1),
        flow_training=TrainConfig(steps=60 if smoke else 2000, batch_size=64),
        **shared,
    )


def table1(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Unconditional:
    """Runs the experiment; writes `results.json`, `report.html` and all zoos and models under `out`.

    Raises:
        FlownError: `out` exists, or holds a run of another experiment, scale or seed.
    """
    begun = begin(out, "table1", scale, seed, resume, overwrite)
    out = begun.path
    result = run(config(scale, seed), out, device=device)
    rows = [_beside_paper(row) for x in result.results for row in x.rows()]
    write_results(out / "results.json", "table1", scale, result.about, rows)
    write_report(
        out / "report.html",
        f"Table 1 at the {scale} scale",
        result.card,
        {},
        result.about,
        _LEAD,
        section=_summary(rows),
    )
    return result


_LEAD = (
    "A generator of its own for each network and data set, without conditioning. The paper reports the "
    "best network; here it is chosen on validation images, and all networks come first."
)


def _beside_paper(row: Row) -> Row:
    """The paper's figures are of the best network."""
    if row["metric"] != "accuracy" or row["selection"] == "all":
        return row
    place = row["net"], row["encoder"], row["dataset"], row["method"]
    return {**row, "paper": PAPER.get(place)}


def _summary(rows: list[Row]) -> Section:
    """The table: a line a cell; original, FLoWN and p-diff, all and best, and their cost."""
    found = {
        (r["net"], r["encoder"], r["dataset"], r["method"], r["metric"], r["selection"] == "all"): r
        for r in rows
    }
    body = []
    for place in dict.fromkeys((r["net"], r["encoder"], r["dataset"]) for r in rows):
        line = ["{} ({}), {}".format(*place)]
        for everything in (True, False):
            for method in METHODS:
                row = found[(*place, method, "accuracy", everything)]
                std = f" ± {row['std']:.2f}" if everything and row["std"] is not None else ""
                paper = "" if row["paper"] is None else f" ({row['paper']:.2f})"
                line.append(f"{row['value']:.2f}{std}{paper}")
        for method in METHODS[1:]:
            seconds, nfe = (found[(*place, method, x, True)]["value"] for x in ("seconds", "nfe"))
            line.append(f"{seconds:.1f} ({nfe})")
        body.append(line)
    names = [style_of(method).label for method in METHODS]
    head = [
        "network (encoder), data",
        *(f"{x}: mean" for x in names),
        *(f"{x}: best" for x in names),
        *(f"{x}: s (NFE)" for x in names[1:]),
    ]
    note = (
        "Test accuracy, %: mean ± standard deviation over all networks, and the network that is best on "
        "validation images; in brackets the paper's best, on full data. Seconds to sample all networks, "
        "and evaluations of the velocity network for each. Where a generator learns from several "
        "trainings, means also depend on which training a sample resembles."
    )
    return Section("Table 1", note, (head, body))
