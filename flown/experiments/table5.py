"""Table 5: classifier heads generated from one image a class, beside baselines and known methods.

A ResNet-12 that knows mini-ImageNet's base classes gives features, probes of their tasks are the zoo,
and test tasks come from classes and data sets that no training used. All methods see the same tasks: 5
ways, 1 shot, 15 queries a class. They see them by one of two protocols, which are never compared:

    inductive      a head is made from the support set alone
    transductive   all 75 unlabelled queries of the task are seen as well

D2NWG has two rows: predicting noise by its own schedule, as published, and as a v-diffusion, which is
better after this little training (`flown.flow.diffusion`). A flow that starts at a nearest-centroid head
stands beside that head. STL-10 is used if its data is installed; otherwise `natural10` takes its place
under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import tasks as data
from flown.base.config import Config
from flown.base.progress import bar
from flown.base.provenance import Row, write_results
from flown.context import CAML, CAMLConfig, FeatureSet
from flown.context.episodes import train_caml
from flown.context.pretrain import MetaBaselineConfig, train_backbone
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.experiments.retrieval import present
from flown.flow.diffusion import even_steps
from flown.heads import classifiers, maml
from flown.heads.classifiers import apply_heads
from flown.heads.features import Standardised, cached_features, load_backbone
from flown.heads.frames import class_tokens, join_rows
from flown.heads.heads import HeadsConfig, train_heads, zoo_tokens
from flown.heads.incontext import in_context
from flown.heads.maml import MAML, MAMLConfig, train_maml
from flown.heads.meta import HeadFlow, HeadFlowConfig, fit_heads
from flown.heads.probe import ProbeConfig, probe
from flown.heads.transductive import SHARPNESSES, STRENGTHS, laplacian, soft_kmeans
from flown.measure.interval import interval
from flown.report.table5 import write_table5
from flown.tasks import ClassPool, Episodes, ManyClass, check_disjoint
from flown.training import TrainConfig

BASE = "mini_imagenet"
# Mean of the best three of fifty, chosen on the queries; the datasets are the paper's.
PAPER = {
    ("cifar10", "vae-reconstruction"): 73.1,
    ("stl10", "vae-reconstruction"): 80.4,
    ("cifar10", "flown"): 51.46,
    ("stl10", "flown"): 56.24,
}
PROTOCOLS = ("inductive", "transductive")
VARIANTS: dict[str, dict[str, Any]] = {
    "flown": {},
    "flown-gaussian": {"source": "gaussian"},
    "d2nwg": {"process": "latent-diffusion"},
    "d2nwg-v": {"process": "v-diffusion"},
}
# Methods of one protocol, whose accuracies are compared task by task.
PAIRS = {
    "inductive": (("flown", "flown-start"), ("flown-mean", "flown-start"), ("flown-mean", "ridge")),
    "transductive": (
        ("flown", "flown-start"),
        ("flown-mean", "flown-start"),
        ("flown-mean", "soft-kmeans"),
        ("flown-mean", "laplacian"),
    ),
}
_TOP = 3


class Table5Config(Config):
    """`backbone`: a name of `flown.heads.features.load_backbone`, or None to train one."""

    backbone: str | None = None
    pretraining: MetaBaselineConfig = MetaBaselineConfig()
    heads: HeadsConfig = HeadsConfig()
    fit: HeadFlowConfig = HeadFlowConfig()
    caml: CAMLConfig = CAMLConfig()
    caml_training: TrainConfig = TrainConfig(steps=400, batch_size=16, weight_decay=1e-4, ema=0.99)
    maml_training: TrainConfig = TrainConfig(steps=600, batch_size=16, ema=0.99)
    sets: tuple[str, ...] = (BASE, "cifar10", "natural10", "omniglot")
    tasks: int = 100
    queries: int = 15
    samples: int = 50
    steps: int = 5
    diffusion_steps: int = 50
    diffusion_samples: int = 10
    seed: int = 0


def config(scale: str, seed: int = 0) -> Table5Config:
    """The experiment at a scale; `paper` has the published sizes and is meant for a GPU."""
    last = "stl10" if "stl10" in present() else "natural10"
    made = Table5Config(
        backbone="resnet12-small", sets=(BASE, "cifar10", last, "omniglot"), seed=seed
    )
    if scale == "smoke":
        short = TrainConfig(steps=30, batch_size=32, warmup=5)
        return made.model_copy(
            update={
                "heads": HeadsConfig(tasks=200),
                "fit": HeadFlowConfig(encoder_training=short, flow_training=short),
                "caml_training": short,
                "maml_training": short,
                "tasks": 10,
                "samples": 5,
                "diffusion_samples": 5,
                "steps": 5,
                "diffusion_steps": 5,
            }
        )
    if scale == "paper":
        long = TrainConfig(steps=40_000, batch_size=256)
        fit = HeadFlowConfig.published().model_copy(
            update={"encoder_training": long, "flow_training": long}
        )
        whole = TrainConfig(
            steps=12_000, batch_size=128, learning_rate=2e-3, weight_decay=0.05, ema=0.0
        )
        return made.model_copy(
            update={
                "backbone": None,
                "fit": fit,
                "pretraining": MetaBaselineConfig(classification=whole),
                "steps": 100,
                "diffusion_steps": 1000,
                "diffusion_samples": 50,
                "caml": CAMLConfig.published().model_copy(update={"ways": 5}),
            }
        )
    return made


class Models(NamedTuple):
    """The models trained on base classes, flows by protocol; numbers chosen on validation tasks."""

    flows: dict[str, dict[str, HeadFlow]]
    caml: CAML
    maml: MAML
    ridge: float
    kmeans: float
    laplacian: float


def table5(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    settings: Table5Config | None = None,
) -> list[Row]:
    """Runs the experiment; writes `results.json`, `report.html` and all that is trained under `out`.

    Args:
        device: everything but the backbone's training runs on the CPU.
    """
    begun = begin(out, "table5", scale, seed, resume, overwrite)
    out = begun.path
    settings = settings or config(scale, seed)
    clock = Clock(out / "seconds.json")
    many = data.load_many(BASE)
    check_disjoint(many.class_split)
    backbone, rows = _backbone(many, settings, out, device)
    clock.record("backbone")
    found = cached_features(backbone, many.images, out / "features")
    base = FeatureSet(found, many.labels, many.class_split)
    models = _train(base, settings, out, clock)
    tests = dict(_tests(backbone, base, settings, out))
    with bar("table 5", len(tests)) as update:
        for done, (name, tasks) in enumerate(tests.items(), 1):
            rows += measure(name, tasks, models, settings)
            update(done, name)
    clock.record("tests")
    rows += _order(tests[BASE], models.flows["transductive"]["flown"], seed)
    counts = {name: {"tasks": len(tasks.support)} for name, tasks in tests.items()}
    counts["heads"] = {"tasks": settings.heads.tasks}
    about = clock.about(settings, counts, device)
    write_results(out / "results.json", "table5", scale, about, rows)
    write_table5(out / "report.html", f"Table 5 at the {scale} scale", rows, about)
    return rows


def _backbone(
    many: ManyClass, settings: Table5Config, out: Path, device: str
) -> tuple[nn.Module, list[Row]]:
    """The backbone, and its accuracy on validation classes."""
    if settings.backbone is not None:
        return load_backbone(settings.backbone), []
    path = out / "backbone.safetensors"
    trained, figures = train_backbone(
        many,
        settings.pretraining,
        out=out / "backbone",
        seed=settings.seed,
        resume=True,
        device=device,
    )
    seen = torch.isin(many.labels, many.class_split["train"])
    Standardised(trained.cpu()).fit(many.images[seen]).save(path, figures)
    rows = [
        _row(
            "mini_imagenet, validation classes", "inductive", f"backbone, {stage}", value, None, 600
        )
        for stage, value in figures.items()
    ]
    return Standardised.load(path), rows


def _train(base: FeatureSet, settings: Table5Config, out: Path, clock: Clock) -> Models:
    """The zoo of heads, then all models that learn from base classes."""
    heads, known = settings.heads, base.class_split["train"]
    size = base.features.shape[1]
    zoo = train_heads(base.features, base.labels, known, out / "zoo", heads, resume=True)
    clock.record("heads")
    use = torch.tensor([i for i, row in enumerate(zoo.rows) if row.split == "train"])
    vectors = zoo.read(use.tolist())
    flows: dict[str, dict[str, HeadFlow]] = {}
    for protocol in PROTOCOLS:
        queries, flows[protocol] = protocol == "transductive", {}
        tokens = zoo_tokens(base.features, base.labels, known, heads, queries)[use]
        for name, change in VARIANTS.items():
            flows[protocol][name] = fit_heads(
                vectors,
                tokens,
                settings.fit.model_copy(update={**change, "queries": queries}),
                out=out / protocol / name,
                resume=True,
                like=flows[protocol].get("flown"),
            )
            clock.record(f"{name}, {protocol}")
    caml = train_caml(
        [base],
        settings.caml.model_copy(update={"feature_dim": size}),
        settings.caml_training,
        out=out / "caml",
        seed=settings.seed,
        resume=True,
    )
    learner = train_maml(
        [base],
        MAMLConfig(features=size),
        settings.maml_training,
        out=out / "maml",
        seed=settings.seed,
        resume=True,
    )
    clock.record("caml and maml")
    val = _tasks(base.features, base.pool("val"), settings, settings.seed)
    return Models(
        flows,
        caml,
        learner,
        classifiers.choose_strength(val),
        classifiers.choose(soft_kmeans, val, SHARPNESSES),
        classifiers.choose(laplacian, val, STRENGTHS),
    )


def _tests(
    backbone: nn.Module, base: FeatureSet, settings: Table5Config, out: Path
) -> Iterator[tuple[str, Episodes]]:
    """Test tasks of each set; no training used its classes or images."""
    for name in settings.sets:
        if name == BASE:
            found, labels, classes = base.features, base.labels, base.class_split["test"]
        elif name == "omniglot":
            many = data.load_many(name)
            images, labels, classes = many.images, many.labels, many.class_split["test"]
            found = cached_features(backbone, images, out / "features")
        else:
            test = data.load(name).test
            labels, classes = test.labels, test.labels.unique()
            found = cached_features(backbone, test.images, out / "features")
        yield name, _tasks(found, ClassPool(labels, classes), settings, settings.seed + 1)


def _tasks(features: Tensor, pool: ClassPool, settings: Table5Config, seed: int) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    ways, queries = settings.heads.ways, settings.queries
    return pool.draw(ways, 1, queries, generator, settings.tasks).gather(features)


def measure(name: str, tasks: Episodes, models: Models, settings: Table5Config) -> list[Row]:
    """All rows of one set: percent of queries, mean and 95 % interval over tasks."""
    rows: list[Row] = []
    for protocol in PROTOCOLS:
        row = partial(_row, name, protocol)
        made = _inductive if protocol == "inductive" else _transductive
        found = {
            method: classifiers.accuracy(logits, tasks)
            for method, logits in made(tasks, models, settings).items()
        }
        generated: list[Row] = []
        for method, model in models.flows[protocol].items():
            process = model.config.process
            steps, samples = settings.steps, settings.samples
            if process != "flow":
                steps = even_steps(process, settings.diffusion_steps)
                samples = settings.diffusion_samples
            tokens = class_tokens(tasks, model.config.queries)
            heads = model.generate(tokens, samples, settings.seed, steps=steps)
            mean = apply_heads(heads.mean(dim=1), tasks.query)
            found[method] = sample_accuracy(heads, tasks).mean(dim=1)
            found[f"{method}-mean"] = classifiers.accuracy(mean, tasks)
            if process == "flow":  # of diffusions there are too few to choose from
                generated += _chosen(row, method, heads, tasks)
            if method == "flown":
                start = join_rows(tokens.unframed(model.centroid_rows(tokens.tokens)))
                found["flown-start"] = classifiers.accuracy(apply_heads(start, tasks.query), tasks)
                generated += _tuned(row, method, heads, tasks, settings.heads.probe)
        rows += [row(method, *interval(values)) for method, values in found.items()]
        rows += generated
        rows += [
            row(f"{one} - {other}", *interval(found[one] - found[other])) | {"metric": "difference"}
            for one, other in PAIRS[protocol]
        ]
    return rows


def _inductive(tasks: Episodes, models: Models, settings: Table5Config) -> dict[str, Tensor]:
    """Logits (T, W Q, W) of methods that see the support alone."""
    zeros = probe(tasks.support, tasks.ways, settings.heads.probe)
    tokens = class_tokens(tasks, queries=False)
    coded = models.flows["inductive"]["flown"].reconstruct(zeros, tokens)
    return {
        "linear-probe": classifiers.linear_probe(tasks, settings.seed),
        "linear-probe-zero": apply_heads(zeros, tasks.query),
        "vae-reconstruction": apply_heads(coded, tasks.query),
        "nearest-cosine": classifiers.cosine_centroid(tasks),
        "nearest-euclidean": classifiers.euclidean_centroid(tasks),
        "ridge": classifiers.ridge(tasks, models.ridge),
        "caml": in_context(tasks, models.caml),
        "maml-first-order": maml.maml(tasks, models.maml),
    }


def _transductive(tasks: Episodes, models: Models, settings: Table5Config) -> dict[str, Tensor]:
    """Logits (T, W Q, W) of methods that see all queries at once."""
    return {
        "soft-kmeans": soft_kmeans(tasks, models.kmeans),
        "laplacian": laplacian(tasks, models.laplacian),
    }


def _chosen(row: partial[Row], method: str, heads: Tensor, tasks: Episodes) -> list[Row]:
    """The best three samples by the support, and the best three by the queries."""
    accuracy = sample_accuracy(heads, tasks)  # (T, n)
    count, top = accuracy.shape[1], min(_TOP, accuracy.shape[1])
    logits = apply_heads(heads, tasks.support[:, None])  # (T, n, W K, W)
    targets = tasks.labels[:, None].expand(logits.shape[:3])
    loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    loss = loss.view(targets.shape).mean(dim=2)
    chosen = accuracy.gather(1, loss.topk(top, largest=False).indices)
    best = accuracy.topk(top).values
    return [
        row(method, *interval(values.mean(dim=1)), selection)
        for values, selection in (
            (chosen, f"support-top{top}-of-{count}"),
            (best, f"queries-top{top}-of-{count}, the paper's protocol"),
        )
    ]


def _tuned(
    row: partial[Row], method: str, heads: Tensor, tasks: Episodes, config: ProbeConfig
) -> list[Row]:
    """Generated heads after gradient steps on the support."""
    samples, rows = heads.shape[1], []
    support = tasks.support.repeat_interleave(samples, dim=0)
    for steps in (1, 5, 20):
        tuned = probe(
            support, tasks.ways, config.model_copy(update={"epochs": steps}), heads.flatten(0, 1)
        ).view_as(heads)
        found = sample_accuracy(tuned, tasks).mean(dim=1)
        rows.append(row(f"{method}+{steps}", *interval(found)))
    return rows


def sample_accuracy(heads: Tensor, tasks: Episodes) -> Tensor:
    """Percent of each task's queries by each of its heads (T, n, W F + W): (T, n)."""
    logits = apply_heads(heads, tasks.query[:, None])
    return 100 * (logits.argmax(dim=3) == tasks.targets[:, None]).float().mean(dim=2)


def _order(tasks: Episodes, model: HeadFlow, seed: int) -> list[Row]:
    """The largest difference between heads for reordered classes and reordered heads."""
    tokens = class_tokens(tasks)[:8]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tasks.ways, generator=generator)
    noise = torch.randn(len(tokens), 2, tasks.ways, *model.latent_shape, generator=generator)
    plain = model.generate(tokens, 2, steps=5, noise=noise)
    turned = model.generate(tokens.permuted(order), 2, steps=5, noise=noise[:, :, order])
    logits = [apply_heads(h, tasks.query[:8, None]) for h in (plain, turned)]
    worst = float((logits[0][..., order] - logits[1]).abs().max())
    scale = float(logits[0].abs().max())
    return [
        {
            **_row(BASE, "transductive", "flown", worst / scale, None, len(tokens)),
            "metric": "largest relative difference of logits, classes permuted",
        }
    ]


def _row(
    dataset: str,
    protocol: str,
    method: str,
    value: float,
    half: float | None,
    n: int,
    selection: str = "all",
) -> Row:
    compared = protocol == "inductive" and (selection != "all" or "vae" in method)
    paper = PAPER.get((dataset, method)) if compared else None
    return {
        "dataset": dataset,
        "protocol": protocol,
        "method": method,
        "metric": "accuracy",
        "value": value,
        "std": None,
        "interval": half,
        "n": n,
        "selection": selection,
        "epoch": None,
        "paper": None if selection.startswith("support") else paper,
    }
