"""Few steps: what makes a flow that one to four evaluations follow as well as a hundred.

The encoder of a model stays; its flow is trained again in several ways, all with the same network,
contexts and number of steps:

    independent     the paper's flow, and with better solvers at the same number of evaluations
    ot              pairs re-ordered within a batch (Tong et al.)
    semi-discrete   each noise has its network (`flown.flow.semidiscrete`), with either loss, and with
                    more of the early times
    reflow          begins with the first flow, and learns from pairs (x_0, x_1) of its own, 100 steps
                    apart (Liu et al. 2209.03003), by pseudo-Huber (Lee et al. 2405.20320)

All networks count, none is chosen; support sets and validation accuracies are of validation images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from flown import flow
from flown import tasks as data
from flown.base.config import Config
from flown.base.files import file_name, read_json, write_json
from flown.base.progress import bar
from flown.base.provenance import Row, write_results
from flown.context.tokens import Contexts
from flown.experiments.begin import Result, begin
from flown.experiments.clock import Clock
from flown.generator.config import FlowConfig
from flown.generator.data import TrainingSet
from flown.generator.files import shipped_zoo
from flown.generator.fit import FlowParts, fit_flow
from flown.generator.model import Flown
from flown.measure.reference import Evaluator
from flown.report.steps import write_steps
from flown.tasks import ImageData, draw_support
from flown.training import TrainConfig, train
from flown.zoo import Zoo

REFLOW = "reflow"
_SUPPORTS = 5  # that share the networks of a task
_FOLLOWED = 100  # steps of the first flow that pairs are made with


class StepsStudy(Config):
    """`samples` networks a task by each of `solvers`, (name, steps); `pairs` of the first flow a task.

    They are measured on at most `images` validation and as many test images, all on the same.
    """

    model: str = "flown-small"
    flows: dict[str, FlowConfig] = Field(
        default={
            "independent": FlowConfig(),
            "ot": FlowConfig(coupling="ot"),
            "semi-discrete": FlowConfig(coupling="semi-discrete"),
            "semi-discrete, pseudo-huber": FlowConfig(
                coupling="semi-discrete", loss="pseudo-huber"
            ),
            "semi-discrete, pseudo-huber, early": FlowConfig(
                coupling="semi-discrete", loss="pseudo-huber", times="early"
            ),
        }
    )
    training: TrainConfig = TrainConfig(steps=4000, batch_size=96)
    solvers: tuple[tuple[str, int], ...] = (
        ("euler", 1),
        ("euler", 2),
        ("euler", 4),
        ("midpoint", 2),
        ("heun", 2),
        ("euler", 100),
    )
    pairs: int = 2000
    samples: int = Field(default=50, ge=_SUPPORTS)
    images: int = 2000
    seed: int = 0


def steps(
    out: Path,
    scale: str = "cpu",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Result:
    """Runs the study and writes `results.json`; flows that are there are not trained again.

    Raises:
        FlownError: a data set is not here, or `out` holds another study.
    """
    begun = begin(out, "steps", scale, seed, resume, overwrite)
    study = StepsStudy(seed=seed)
    if scale == "smoke":
        brief = study.training.model_copy(update={"steps": 20})
        study = study.model_copy(update={"training": brief, "pairs": 8, "samples": 5})
    model, zoo = Flown.from_pretrained(study.model).to(device), Zoo.open(shipped_zoo(study.model))
    images = {task: data.load(task) for task in zoo.tasks}
    return run(study, model, zoo, images, begun.path, scale, device)


def run(
    study: StepsStudy,
    model: Flown,
    zoo: Zoo,
    images: Mapping[str, ImageData],
    out: Path,
    scale: str,
    device: str = "cpu",
) -> Result:
    """As `steps`, of any model with a context, its zoo and images by task, in a folder that was begun."""
    clock = Clock(out / "seconds.json")
    networks = TrainingSet.of(zoo, model.config.epochs)
    known = list(networks.tasks.values())
    assert model.support is not None
    by_set = {task.dataset: images[task.id] for task in known}
    contexts = Contexts(model.support, known, by_set, model.config.context, model.classes)
    found: list[Row] = []
    names = [*study.flows, REFLOW]
    with bar("flows", len(names)) as update:
        for done, name in enumerate(names):
            folder = out / file_name(name)
            if not (folder / "rows.json").exists():
                if name == REFLOW:
                    first: Flown = Flown.from_pretrained(out / file_name(names[0]) / "model")
                    made = _reflow(first.to(device), contexts, study, folder, device)
                else:
                    made = _fitted(model, networks, contexts, study, name, folder, device)
                made.save_pretrained(str(folder / "model"))
                clock.record(f"training {name}")
                write_json(folder / "rows.json", _measure(made, name, zoo, images, study))
                clock.record("measuring")
            found += read_json(folder / "rows.json")
            update(done + 1, name)
    counts = {"checkpoints": len(zoo), "zoo": zoo.identity}
    counts |= {task: {"test": len(x.test), "val": len(x.val)} for task, x in images.items()}
    about = clock.about(study, counts, device)
    write_results(out / "results.json", "steps", scale, about, found)
    write_steps(out / "report.html", found, about)
    return Result(found, about)


def _fitted(
    model: Flown,
    networks: TrainingSet,
    contexts: Contexts,
    study: StepsStudy,
    name: str,
    folder: Path,
    device: str,
) -> Flown:
    """The model with another flow on the same latents."""
    changes = {"flow": study.flows[name], "flow_training": study.training, "seed": study.seed}
    config = model.config.model_copy(update=changes)
    source = model.space.source(config, {})
    parts = fit_flow(networks, model.space, source, contexts, config, folder, True, device)
    return Flown(config, model.space, parts, model.support, model.tasks, {})


class _Pairs(nn.Module):
    """Flow matching on pairs (T, P, *L) of another flow."""

    def __init__(
        self,
        model: Flown,
        contexts: Contexts,
        pairs: tuple[Tensor, Tensor],
        batch: int,
    ) -> None:
        super().__init__()
        self.velocity, self.head = model.velocity, model.head
        self.contexts, self.pairs, self.batch = contexts, pairs, batch

    def forward(self, generator: torch.Generator) -> Tensor:
        x0, x1 = self.pairs
        device, size = x0.device, (self.batch,)
        tasks = torch.randint(len(x0), size, generator=generator, device=device)
        rows = torch.randint(x0.shape[1], size, generator=generator, device=device)
        assert self.head is not None
        context = self.head(self.contexts.draw(tasks, generator))
        return flow.flow_matching_loss(
            self.velocity,
            x0[tasks, rows],
            x1[tasks, rows],
            context,
            generator=generator,
            loss="pseudo-huber",
        )


def _reflow(
    first: Flown, contexts: Contexts, study: StepsStudy, folder: Path, device: str
) -> Flown:
    """The first flow, trained on where it leads to."""
    parts = FlowParts(copy.deepcopy(first.velocity), copy.deepcopy(first.head), first.form)
    made = Flown(first.config, first.space, parts, first.support, first.tasks, {})
    batch = study.training.batch_size
    objective = _Pairs(made, contexts, _followed(first, contexts, study), batch)
    objective.requires_grad_(True)
    train(
        objective,
        study.training,
        out=folder,
        name="flow",
        seed=study.seed + 1,
        resume=True,
        device=device,
    )
    objective.requires_grad_(False)
    return made


@torch.no_grad()
def _followed(first: Flown, contexts: Contexts, study: StepsStudy) -> tuple[Tensor, Tensor]:
    """Noise and where the first flow leads it to, (T, P, *L) each, under contexts of training."""
    generator = torch.Generator(first.device).manual_seed(study.seed + 2)
    starts, ends = [], []
    assert first.head is not None
    for place in range(len(contexts.tasks)):
        task = torch.full((study.pairs,), place, device=first.device)
        x0 = torch.randn(study.pairs, *first.space.shape, generator=generator, device=first.device)
        velocity = first.velocity.bind(first.head(contexts.draw(task, generator)))
        starts.append(x0)
        ends.append(flow.integrate(velocity, x0, steps=_FOLLOWED).x)
    return torch.stack(starts), torch.stack(ends)


def _measure(
    model: Flown, name: str, zoo: Zoo, images: Mapping[str, ImageData], study: StepsStudy
) -> list[dict[str, Any]]:
    """Validation and test accuracy and overlap of errors, by task and solver."""
    rows = []
    for task in zoo.tasks:
        evaluator = Evaluator(images[task], study.images, model.device)
        draw = torch.Generator().manual_seed(study.seed)
        classes, shots = len(images[task].classes), model.config.context.shots
        supports = [draw_support(images[task].val, classes, shots, draw) for _ in range(_SUPPORTS)]
        layout = model.space.place(zoo.layout(task))
        for solver, count in study.solvers:
            made = [
                model.sample(*support, study.samples // _SUPPORTS, i, solver, count, layout=layout)
                for i, support in enumerate(supports)
            ]
            vectors = torch.cat([x.batch.vectors for x in made])
            measured = evaluator.measure(made[0].batch.on(vectors))
            for metric, values in (
                ("validation accuracy", measured.val),
                ("accuracy", measured.test),
                ("diversity-iou", torch.tensor([measured.diversity])),
            ):
                rows.append(
                    {
                        "dataset": task,
                        "method": f"{name}, {solver} {count}",
                        "flow": name,
                        "solver": solver,
                        "steps": count,
                        "nfe": made[0].nfe,
                        "metric": metric,
                        "value": round(float(values.mean()), 3),
                        "std": round(float(values.std()), 3) if len(values) > 1 else None,
                        "n": len(vectors),
                        "selection": "all",
                        "epoch": None,
                        "paper": None,
                    }
                )
    return rows
