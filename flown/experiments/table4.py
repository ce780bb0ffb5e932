"""Table 4 (FLoWN 3.1): an unconditional generator, static and fine-tuned, on another data set.

For every network and encoder a generator is fitted on each data set, and asked for networks for the
other's images; static, with its flow trained through the solver, with its decoder trained too, and
with its flow trained by adjoint matching. STL-10 is used where its data is here, `natural10` takes
its place, under its own name, where it is not. Classes that both have are matched by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from flown import data, zoo
from flown.adapt import AdaptConfig, adapt, sample
from flown.card import Card, Measured, TaskCard
from flown.config import Config
from flown.experiments import table1
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.experiments.retrieval import present
from flown.experiments.transfer import from_best, from_default_init, match_classes, measure
from flown.experiments.unconditional import Cell
from flown.model import Flown
from flown.provenance import Row, digest, write_results
from flown.report import write_report
from flown.report.html import table_html
from flown.training import TrainConfig
from flown.weights import WeightBatch
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
METHODS = ("static", "fine-tuned", "fine-tuned-decoder", "adjoint", "from-default-init",
           "from-best-static", "zoo")  # fmt: skip


class Table4Config(Config):
    """Generators of one network and encoder are asked for each other's data; `controls` networks a
    control."""

    generators: tuple[Cell, ...]
    adaptations: dict[str, AdaptConfig]
    samples: int = 50
    controls: int = 3
    steps: int = 100
    seed: int = 0


@dataclass
class Transfer:
    """One generator on another's images: everything measured."""

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

    def rows(self) -> list[Row]:
        """In the schema of `results.json`; the best network is chosen on validation images."""
        found: list[Row] = []
        about = {"net": self.net, "encoder": self.encoder, "source": self.source,
                 "dataset": self.target}  # fmt: skip
        paper = PAPER.get((self.net, self.encoder, self.source, self.target), (None, None))
        figures = dict(zip(METHODS, paper, strict=False))
        for method, m in self.methods.items():
            n = len(m.test)
            shared = {**about, "method": method, "epoch": None, "paper": None, "n": n}
            found.append({**shared, "metric": "accuracy", "value": float(m.test.mean()),
                          "std": float(m.test.std()), "selection": "all",
                          "paper": figures.get(method)})  # fmt: skip
            found.append({**shared, "metric": "accuracy", "value": float(m.top(1)), "std": None,
                          "n": 1, "selection": f"val-best-of-{n}"})  # fmt: skip
            found.append({**shared, "metric": "diversity-iou", "value": m.diversity, "std": None,
                          "selection": "all"})  # fmt: skip
            if method in self.seconds:
                found.append({**shared, "metric": "seconds", "value": self.seconds[method],
                              "std": None, "selection": "all"})  # fmt: skip
        return found


def config(scale: str, seed: int = 0) -> Table4Config:
    """The experiment at a scale; `paper` has the published sizes and is meant for a GPU."""
    last = "stl10" if "stl10" in present() else "natural10"
    pair = ("cifar10", last)
    kinds = ("vae",) if scale == "smoke" else tuple(table1.ENCODERS)
    generators = [table1.whole(kind, dataset, scale, seed) for kind in kinds for dataset in pair]
    if scale == "paper":
        generators += [table1.subset(f"{dataset}-resnet18-norms", scale, seed) for dataset in pair]
    sizes = {"smoke": (2, 2, 16), "cpu": (200, 8, 64), "paper": (4000, 8, 128)}
    steps, networks, images = sizes[scale]
    training = TrainConfig(steps=steps, batch_size=images, learning_rate=3e-3, weight_decay=0.0,
                           warmup=10, ema=0.95, validate_every=max(1, steps // 4),
                           checkpoint_every=max(1, steps // 8))  # fmt: skip
    base = AdaptConfig(networks=networks, steps=100 if scale == "paper" else 20, training=training,
                       validated=16, seed=seed)  # fmt: skip
    adaptations = {
        "fine-tuned": base,
        "fine-tuned-decoder": base.model_copy(update={"parts": ("flow", "decoder")}),
        "adjoint": base.model_copy(update={"method": "adjoint"}),
    }
    less: dict[str, Any] = {"samples": 6, "controls": 2, "steps": 10} if scale == "smoke" else {}
    return Table4Config(generators=tuple(generators), adaptations=adaptations, seed=seed, **less)


def table4(out: Path, scale: str, *, seed: int = 0, resume: bool = False, overwrite: bool = False,
           device: str = "cpu") -> list[Transfer]:  # fmt: skip
    """Runs the experiment; writes `results.json`, `report.html` and everything trained under `out`.

    Raises:
        FlownError: `out` exists, or holds a run of another experiment, scale or seed.
    """
    out = begin(out, "table4", scale, seed, resume, overwrite)
    settings = config(scale, seed)
    clock = Clock(out / "seconds.json")
    results, counts = run(settings, out, device, clock)
    about = clock.about(settings, counts, device)
    rows = [row for result in results for row in result.rows()]
    write_results(out / "results.json", "table4", scale, about, rows)
    tasks = {x.name: TaskCard(x.name, x.methods) for x in results}
    card = Card(tasks, settings.samples, 1, 0, "euler", settings.steps, seed, device, "",
                digest(settings), counts)  # fmt: skip
    write_report(out / "report.html", f"Table 4 at the {scale} scale", card, {}, about, _LEAD,
                 extra=_summary(results))  # fmt: skip
    return results


def run(settings: Table4Config, out: Path, device: str,
        clock: Clock) -> tuple[list[Transfer], dict[str, Any]]:  # fmt: skip
    """All transfers between generators of one network and encoder, going on from what is there."""
    results = []
    counts: dict[str, Any] = {}
    made: dict[str, tuple[Cell, Zoo, Flown]] = {}
    for generator in settings.generators:
        name, how = generator.recipe.name, generator.recipe
        trained = zoo.train(how, generator.models, out / "zoos" / name, seed=settings.seed,
                            resume=True, device=device)  # fmt: skip
        images = data.load(how.dataset)
        counts[how.dataset] = {"train": len(images.train), "test": len(images.test)}
        folder = f"{name}-{generator.fit.encoder.kind}"
        model = Flown.fit(trained, generator.fit, out=out / "runs" / folder, resume=True,
                          images={how.dataset: images}, device=device)  # fmt: skip
        made[folder] = generator, trained, model
        clock.lap(folder)
    for (name, ours), (_, theirs) in permutations(made.items(), 2):
        one, other = ours[0], theirs[0]
        if (one.recipe.net, one.fit.encoder.kind) == (other.recipe.net, other.fit.encoder.kind):
            target = other.recipe.dataset
            results.append(_transfer(ours, theirs[1], settings, out / f"{name}-to-{target}",
                                     device, clock))  # fmt: skip
    return results, counts


def _transfer(ours: tuple[Cell, Zoo, Flown], ceiling: Zoo, settings: Table4Config, out: Path,
              device: str, clock: Clock) -> Transfer:  # fmt: skip
    generator, _, model = ours
    source, theirs = model.tasks[0], data.load(ceiling.tasks[0])
    images = match_classes(theirs, model.joint.layouts[0].task.classes)

    def drawn(model: Flown) -> WeightBatch:
        return sample(model, images, source, settings.samples, settings.seed, "euler", settings.steps)

    static = drawn(model)
    methods, seconds = {"static": measure(static, images)}, {}
    clock.lap(f"{out.name}: measuring")
    for method, how in settings.adaptations.items():
        adapted = adapt(model, images, how, out=out / method, task=source, resume=True,
                        device=device)  # fmt: skip
        clock.lap(stage := f"{out.name}: {method}")
        seconds[method] = clock.spent[stage]
        methods[method] = measure(drawn(adapted), images)
        clock.lap(f"{out.name}: measuring")
    training = settings.adaptations["fine-tuned"].training
    evaluations = training.steps * settings.adaptations["fine-tuned"].networks
    for method, control in {"from-default-init": from_default_init,
                            "from-best-static": from_best}.items():  # fmt: skip
        batch = _kept(out / f"{method}.safetensors", lambda control=control: control(
            static, images, settings.controls, evaluations, training.batch_size, settings.seed
        ))  # fmt: skip
        methods[method] = measure(batch.to(device), images)
    clock.lap(f"{out.name}: controls")
    last = ceiling.select(split="train", epochs=[-1]).batch(ceiling.tasks[0])
    methods["zoo"] = measure(last.to(device), theirs)
    return Transfer(generator.recipe.net, generator.fit.encoder.kind, source, theirs.name, methods,
                    seconds, evaluations)  # fmt: skip


def _kept(path: Path, make: Any) -> WeightBatch:
    """Reads networks, or makes and keeps them."""
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
    """The table itself: a line a transfer; mean test accuracy of all networks, the paper's beside."""
    body = []
    for result in results:
        paper = PAPER.get((result.net, result.encoder, result.source, result.target))
        cells = [f"{m.test.mean():.1f} ± {m.test.std():.1f}" for m in
                 (result.methods[method] for method in METHODS)]  # fmt: skip
        body.append([result.name, *cells, "–" if paper is None else f"{paper[0]} to {paper[1]}"])
    return ["generator", *METHODS, "paper"], body


def _summary(results: list[Transfer]) -> str:
    notes = "; ".join(f"{x.name}: {x.evaluations} gradient evaluations" for x in results)
    return (
        '<h2>Table 4</h2><p class="note">Mean test accuracy ± standard deviation over networks. '
        "Classes that both data sets have are matched by name (automobile is car); the target's other "
        "classes take the network's other outputs in the data sets' own orders. "
        f"{notes}.</p>{table_html(*summary(results))}"
    )
