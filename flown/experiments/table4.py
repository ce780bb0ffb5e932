"""Table 4 (FLoWN 3.1): an unconditional generator, static and fine-tuned, on another data set.

For every network and encoder a generator is fitted on each data set and generates networks for the
images of the other: static, with its flow trained through the solver, with its decoder trained too,
and with its flow trained by adjoint matching. STL-10 is used if its data is installed; otherwise
`natural10` takes its place under its own name. Classes that both have are matched by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.provenance import Row, digest, write_results
from flown.experiments import table1
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.experiments.retrieval import present
from flown.experiments.transfer import from_best, from_default_init, match_classes
from flown.experiments.unconditional import Cell
from flown.generator.adapt import AdaptConfig, adapt, sample
from flown.generator.card import Card, TaskCard
from flown.generator.model import Flown
from flown.measure.reference import Evaluator, Measured, at_most, deviation
from flown.report import Section, write_report
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo

# (network, encoder, from, to): static, fine-tuned. STL-10 alone: natural10 is another data set.
PAPER = {
    ("resnet18", "vae", "cifar10", "stl10"): (64.20, 72.87),
    ("resnet18", "vae", "stl10", "cifar10"): (93.09, 94.06),
    ("cnn-medium", "vae", "cifar10", "stl10"): (24.01, 60.09),
    ("cnn-medium", "vae", "stl10", "cifar10"): (19.97, 61.38),
    ("cnn-medium", "graph", "cifar10", "stl10"): (23.03, 60.85),
    ("cnn-medium", "graph", "stl10", "cifar10"): (18.13, 69.42),
}
METHODS = (
    "static",
    "fine-tuned",
    "fine-tuned-decoder",
    "adjoint",
    "from-default-init",
    "from-best-static",
    "zoo",
)


class Exchange(Config):
    """Generators of one network and encoder, each used for the other's data.

    `samples` networks a method, `controls` a control; `images` limits the test and validation images.
    """

    generators: tuple[Cell, Cell]
    adaptations: dict[str, AdaptConfig]
    samples: int = 50
    controls: int = 3
    images: int | None = None


class Table4Config(Config):
    """The settings: exchanges, and the number of sampling steps."""

    exchanges: tuple[Exchange, ...]
    steps: int = 100
    seed: int = 0


@dataclass
class Transfer:
    """One generator on the images of another: its measurements."""

    net: str
    encoder: str
    source: str
    target: str
    methods: dict[str, Measured]
    seconds: dict[str, float]
    evaluations: int

    @property
    def name(self) -> str:
        return f"{self.net} ({self.encoder}), {self.source} to {self.target}"

    def gain(self, method: str, other: str) -> float:
        """The lead of one method's mean accuracy over another's, in points."""
        return float(self.methods[method].test.mean() - self.methods[other].test.mean())

    def rows(self) -> list[Row]:
        """In the schema of `results.json`; the best network is chosen on validation images."""
        found: list[Row] = []
        about = {
            "net": self.net,
            "encoder": self.encoder,
            "source": self.source,
            "dataset": self.target,
        }
        paper = PAPER.get((self.net, self.encoder, self.source, self.target), (None, None))
        figures = dict(zip(METHODS, paper, strict=False))
        for method, m in self.methods.items():
            n = len(m.test)
            shared = {**about, "method": method, "epoch": None, "paper": None, "n": n}
            found.append(
                {
                    **shared,
                    "metric": "accuracy",
                    "value": float(m.test.mean()),
                    "std": deviation(m.test),
                    "selection": "all",
                    "paper": figures.get(method),
                }
            )
            found.append(
                {
                    **shared,
                    "metric": "accuracy",
                    "value": float(m.top(1)),
                    "std": None,
                    "n": 1,
                    "selection": f"val-best-of-{n}",
                }
            )
            found.append(
                {
                    **shared,
                    "metric": "diversity-iou",
                    "value": m.diversity,
                    "std": None,
                    "selection": "all",
                }
            )
            if method in self.seconds:
                found.append(
                    {
                        **shared,
                        "metric": "seconds",
                        "value": self.seconds[method],
                        "std": None,
                        "selection": "all",
                    }
                )
                for other in ("static", "from-default-init"):
                    found.append(
                        {
                            **shared,
                            "metric": f"points over {other}",
                            "std": None,
                            "value": self.gain(method, other),
                            "selection": "all",
                        }
                    )
        return found


def config(scale: str, seed: int = 0) -> Table4Config:
    """The experiment at a scale; `paper` has the published sizes and is meant for a GPU."""
    last = "stl10" if "stl10" in present() else "natural10"
    pair = ("cifar10", last)
    evaluations, images, solver_steps = {
        "smoke": (4, 16, 10),
        "cpu": (2400, 64, 10),
        "paper": (32_000, 128, 100),
    }[scale]

    def adaptation(rate: float, evaluations: int, networks: int, **extra: Any) -> AdaptConfig:
        steps = max(1, evaluations // networks)
        training = TrainConfig(
            steps=steps,
            batch_size=images,
            learning_rate=rate,
            weight_decay=0.0,
            warmup=10,
            ema=0.95,
            validate_every=max(1, steps // 12),
            checkpoint_every=max(1, steps // 12),
            choose="val",
        )
        return AdaptConfig(
            networks=networks,
            training=training,
            validated=16,
            seed=seed,
            **{"steps": solver_steps, **extra},
        )

    # A gradient evaluation is worth most in many small steps: 1600 of one network take the flow and
    # the decoder from 26 to 54 % on CIFAR-10, 800 of two to 51 %, 200 of eight to 42 %; but the
    # generator then makes one network again and again, as `diversity-iou` says. A step of
    # adjoint matching costs several of the others, and its SDE wants a finer grid.
    def exchange(first: Cell, second: Cell, evaluations: int, **options: Any) -> Exchange:
        # At 3e-3 the graph encoder's decoder diverges after about 400 steps.
        make = partial(adaptation, 1e-3 if first.fit.encoder.kind == "graph" else 3e-3, evaluations)
        return Exchange(
            generators=(first, second),
            adaptations={
                "fine-tuned": make(1),
                "fine-tuned-decoder": make(1, parts=("flow", "decoder")),
                "adjoint": make(8, method="adjoint", steps=2 * solver_steps),
            },
            **options,
        )

    def whole(kind: str, **limits: Any) -> Exchange:
        first, second = (table1.whole(kind, dataset, scale, seed) for dataset in pair)
        return exchange(first, second, evaluations, **limits)

    if scale == "smoke":
        return Table4Config(exchanges=(whole("vae", samples=6, controls=2),), steps=10, seed=seed)
    # Norm layers have few weights, which train in few steps, but each step of the network is slow.
    limits = {"samples": 20, "controls": 1, "images": 1000} if scale == "cpu" else {}
    first, second = (table1.subset(f"{dataset}-resnet18-norms", scale, seed) for dataset in pair)
    norms = exchange(first, second, evaluations // 8, **limits)
    return Table4Config(exchanges=(*(whole(kind) for kind in table1.ENCODERS), norms), seed=seed)


def table4(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> list[Transfer]:
    """Runs the experiment; writes `results.json`, `report.html` and everything trained under `out`.

    Raises:
        FlownError: `out` exists, or holds a run of another experiment, scale or seed.
    """
    begun = begin(out, "table4", scale, seed, resume, overwrite)
    out = begun.path
    settings = config(scale, seed)
    clock = Clock(out / "seconds.json")
    results, counts = run(settings, out, device, clock)
    about = clock.about(settings, counts, device)
    rows = [row for result in results for row in result.rows()]
    write_results(out / "results.json", "table4", scale, about, rows)
    tasks = {x.name: TaskCard(x.name, x.methods) for x in results}
    most = max(exchange.samples for exchange in settings.exchanges)
    card = Card(
        tasks, most, 1, 0, "euler", settings.steps, seed, device, "", digest(settings), counts
    )
    write_report(
        out / "report.html",
        f"Table 4 at the {scale} scale",
        card,
        {},
        about,
        _LEAD,
        section=_summary(results),
    )
    return results


def run(
    settings: Table4Config, out: Path, device: str, clock: Clock
) -> tuple[list[Transfer], dict[str, Any]]:
    """All transfers between the generators of each exchange; resumes from the files in `out`."""
    results = []
    counts: dict[str, Any] = {}
    for exchange in settings.exchanges:
        made = []
        for generator in exchange.generators:
            name, how = generator.recipe.name, generator.recipe
            trained = zoo.train_zoo(
                how,
                generator.models,
                out / "zoos" / name,
                seed=settings.seed,
                resume=True,
                device=device,
            )
            images = data.load(how.dataset)
            folder = f"{name}-{generator.fit.encoder.kind}"
            model = Flown.fit(
                trained,
                generator.fit,
                out=out / "runs" / folder,
                resume=True,
                images={how.dataset: images},
                device=device,
            )
            images = replace(
                images,
                val=at_most(images.val, exchange.images),
                test=at_most(images.test, exchange.images),
            )
            counts[folder] = {part: len(getattr(images, part)) for part in ("train", "val", "test")}
            made.append((folder, model, trained, images))
            clock.record(folder)
        for (folder, model, *_), (*_, ceiling, images) in permutations(made):
            results.append(
                _transfer(
                    model,
                    ceiling,
                    images,
                    exchange,
                    settings,
                    out,
                    f"{folder}-to-{images.name}",
                    device,
                    clock,
                )
            )
    return results, counts


def _transfer(
    model: Flown,
    ceiling: Zoo,
    target: ImageData,
    exchange: Exchange,
    settings: Table4Config,
    out: Path,
    name: str,
    device: str,
    clock: Clock,
) -> Transfer:
    out, source, generator = out / name, next(iter(model.tasks)), exchange.generators[0]
    images = match_classes(target, model.tasks[source].classes)

    def drawn(model: Flown) -> WeightBatch:
        return sample(model, images, 0, exchange.samples, settings.seed, "euler", settings.steps)

    static = drawn(model)
    evaluator, seconds = Evaluator(images, device=device), {}
    methods = {"static": evaluator.measure(static)}
    clock.record(f"{name}: measuring")
    for method, how in exchange.adaptations.items():
        adapted = adapt(model, images, how, out=out / method, layout=0, resume=True, device=device)
        clock.record(stage := f"{name}: {method}")
        seconds[method] = clock.spent[stage]
        methods[method] = evaluator.measure(drawn(adapted))
        clock.record(f"{name}: measuring")
    training = exchange.adaptations["fine-tuned"].training
    evaluations = training.steps * exchange.adaptations["fine-tuned"].networks
    for method, control in {
        "from-default-init": from_default_init,
        "from-best-static": from_best,
    }.items():
        batch = _kept(
            out / f"{method}.safetensors",
            lambda control=control: control(
                static, images, exchange.controls, evaluations, training.batch_size, settings.seed
            ),
        )
        methods[method] = evaluator.measure(batch)
    clock.record(f"{name}: controls")
    methods["zoo"] = Evaluator(target, device=device).measure(last_trained(ceiling))
    return Transfer(
        generator.recipe.net,
        generator.fit.encoder.kind,
        source,
        target.name,
        methods,
        seconds,
        evaluations,
    )


def last_trained(zoo: Zoo) -> WeightBatch:
    """Every network's last checkpoint in the training split."""
    return zoo.select(split="train").select(epochs=[-1]).batch(next(iter(zoo.tasks)))


def _kept(path: Path, make: Any) -> WeightBatch:
    """Reads networks, or makes and saves them."""
    if not path.exists():
        make().to("cpu").save(path)
    return WeightBatch.load(path)


_LEAD = (
    "A generator of networks for one data set, asked for networks for another's images. The paper "
    "reports static and fine-tuned; the controls train networks themselves, each with as many gradient "
    "evaluations as the fine-tuning spent in all, rate and stopping chosen on validation images. The "
    "zoo is what the same network reaches when trained for the target in the first place."
)


def summary(results: list[Transfer]) -> tuple[list[str], list[list[str]]]:
    """The table: a line a transfer; mean test accuracy of all networks, beside the paper's."""
    body = []
    for result in results:
        paper = PAPER.get((result.net, result.encoder, result.source, result.target))
        cells = [_cell(result.methods[method]) for method in METHODS]
        body.append([result.name, *cells, "–" if paper is None else f"{paper[0]} to {paper[1]}"])
    return ["generator", *METHODS, "paper"], body


def _cell(m: Measured) -> str:
    spread = deviation(m.test)
    return f"{m.test.mean():.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _summary(results: list[Transfer]) -> Section:
    notes = "; ".join(f"{x.name}: {x.evaluations} gradient evaluations" for x in results)
    note = (
        "Mean test accuracy ± standard deviation over networks. Classes that both data sets have are "
        "matched by name (automobile is car); the target's other classes take the network's other "
        f"outputs in the order of each data set. {notes}."
    )
    return Section("Table 4", note, summary(results))
