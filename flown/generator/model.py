"""Flown: weight encoder + support-set context + conditional flow, as one model that can be kept.

    support set --CAML, head--> c (128,)
    x_0 ~ p_0 --dx = v(x, t; c) dt, t: 0 -> 1--> x_1 (4, 4, 4) --decode, unstandardise--> weights (D,)

On disk a model is a folder: `config.json` (written last), `encoder.safetensors`,
`flow.safetensors`, `context.safetensors` and `README.md`, the model card. Of a model for a subset of
tensors, `encoder.safetensors` also holds what the k-th task's networks share, `rest.<k>.<name>`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from flown import encoders, flow
from flown import tasks as data
from flown.base.config import describes
from flown.base.errors import FlownError, unknown
from flown.base.files import RUN, prepare_output, read_json, write_json
from flown.context import ContextHead, KnownTasks, SupportEncoder
from flown.flow.marginals import time_of
from flown.flow.samplers import Samples as Samples  # part of this module's interface
from flown.flow.samplers import solve
from flown.generator import files as modelfiles
from flown.generator import modelcard
from flown.generator.fit import (
    FlownConfig,
    Population,
    context_bank,
    fit_encoder,
    fit_flow,
    load_prior,
)
from flown.measure.evaluate import evaluate
from flown.tasks import ImageData
from flown.training import History
from flown.version import __version__
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, Standardizer, WeightLayout
from flown.zoo import Zoo

_TRIED = 8  # networks of each task, where it takes trying which one a support set is like


class Flown(nn.Module, ModelHubMixin):
    """A trained generator of weights. Made by `Flown.fit` or `Flown.from_pretrained`."""

    def __init__(
        self, config: FlownConfig, joint: JointLayout, prior: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.config, self.joint = config, joint
        self.classes = max(len(layout.task.classes) for layout in joint.layouts)
        self.standardizer = Standardizer(joint)
        self.encoder = encoders.build(config.encoder, joint)
        self.latent_shape: tuple[int, int, int] = self.encoder.latent_shape  # type: ignore[assignment]
        self.velocity = flow.UNet(config.velocity, self.latent_shape, 128)
        self.prior = {k: v for k, v in (prior or {}).items()}
        self.rests: Sequence[dict[str, Tensor]] = [{} for _ in joint.layouts]  # frozen, by task
        self.support: SupportEncoder | None = None
        self.head: ContextHead | None = None
        self.known: KnownTasks | None = None
        self.epochs: tuple[float, ...] = ()  # that the flow passes through, if its path does
        self.history: dict[str, History] = {}
        self.card: dict[str, Any] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks the model was fitted on."""
        return tuple(layout.task.name for layout in self.joint.layouts)

    @property
    def device(self) -> torch.device:
        return self.standardizer.mean.device

    @classmethod
    def fit(
        cls,
        zoo: Zoo,
        config: FlownConfig | None = None,
        *,
        out: Path | str,
        images: Mapping[str, ImageData] | None = None,
        resume: bool = False,
        overwrite: bool = False,
        device: str = "cpu",
    ) -> Flown:
        """Trains encoder and flow on a zoo and saves the model under `out/model`.

        Args:
            zoo: networks of one task or several, split into train and held-out.
            images: image data by task; loaded by the tasks' names otherwise.
            out: the run's folder: checkpoints, `run.json`, `model/`.
            resume: go on from the checkpoints in `out`; ends with the same weights.

        Raises:
            FlownError: `out` exists or belongs to another run; the zoo has a NaN model (named).
            TrainingError: a loss became NaN.
        """
        config = config or FlownConfig()
        out = prepare_output(out, overwrite, resume, [zoo.path])
        run = {"config": config.model_dump(mode="json"), "zoo": zoo.identity, "flown": __version__}
        made = out / "run.json"
        if made.exists() and not describes(made, run, FlownConfig):
            raise FlownError(f"{out}: holds a run with another config or zoo; choose another --out")
        if resume and (out / "model" / "config.json").exists():
            model = cls.from_pretrained(str(out / "model"))
            model.history = read_json(out / "history.json")
            return model.to(device)
        given = images or {task: data.load(task) for task in zoo.tasks}
        images = {
            x.task.name: data.in_order(given[x.task.name], x.task.classes, str(zoo.path))
            for x in zoo.layouts
        }
        people = Population.of(zoo, config.epochs)
        prior = load_prior(config)
        write_json(made, {"format": RUN, **run})
        model = cls(config, people.joint, prior)
        model.standardizer, model.rests = people.standardizer, people.rests
        model.encoder, encoder_history = fit_encoder(people, config, images, out, resume, device)
        model.to(device)
        bank = None
        if config.context.mode != "none":
            model.support = SupportEncoder.pretrained().to(device)
            bank = context_bank(model.support, images, model.tasks, model.classes, config)
            model.known = KnownTasks.of(bank).to(device)
        source = model.source()
        model.velocity, model.head, flow_history, model.epochs = fit_flow(
            people, model.encoder, source, bank, config, out, resume, device
        )
        model.history = {"encoder": encoder_history, "flow": flow_history}
        model.eval().requires_grad_(False)
        write_json(out / "history.json", model.history)
        model.save_pretrained(str(out / "model"))
        return model

    def source(self) -> flow.Source:
        """The flow's source distribution p0."""
        name = self.config.flow.source
        if name not in flow.SOURCES:
            raise unknown("source", name, flow.SOURCES)
        if name == "gaussian":
            return flow.Gaussian(self.latent_shape, self.device)
        shapes = [list(zip(x.names, x.shapes, strict=True)) for x in self.joint.layouts]
        if name == "checkpoint":
            return flow.Checkpoint(self.prior, shapes, self._pack, self._encode_raw)
        made: flow.Source = flow.SOURCES[name](shapes, self._pack, self._encode_raw)
        return made

    def _pack(self, tensors: dict[str, Tensor], task: int) -> Tensor:
        return self.joint.embed(self.joint.layouts[task].pack(tensors), task).to(self.device)

    @torch.no_grad()
    def _encode_raw(self, joint: Tensor, tasks: Tensor) -> Tensor:
        return self.encoder.encode(self.standardizer(joint, tasks))  # type: ignore[operator,no-any-return]

    def _task(self, name: str) -> int:
        if name not in self.tasks:
            raise unknown("task", name, self.tasks)
        return self.tasks.index(name)

    def encode(self, batch: WeightBatch) -> Tensor:
        """Networks of one of the model's tasks to standardised latents (n, *latent_shape)."""
        task = self._task(batch.layout.task.name)
        self.joint.layouts[task].check_same_weights(batch.layout, "encode")
        vectors = self.joint.embed(batch.vectors.to(self.device), task)
        return self._encode_raw(vectors, torch.full((len(batch),), task, device=self.device))

    def decode(self, latents: Tensor, task: str) -> WeightBatch:
        """Latents (n, *latent_shape) to networks of a task, whose BatchNorm is to be `calibrated`.

        Differentiable.

        Raises:
            FlownError: unknown task, or the decoded weights hold NaN or Inf.
        """
        index = self._task(task)
        standard = self.encoder.decode(latents)  # type: ignore[operator]
        tasks = torch.full((len(latents),), index, device=latents.device)
        vectors = self.joint.extract(self.standardizer.invert(standard, tasks), index)
        if not torch.isfinite(vectors).all():
            raise FlownError(f"decoding for task '{task}' gave NaN or Inf weights")
        return WeightBatch(self.joint.layouts[index], vectors, rest=self.rests[index])

    def reconstruct(self, batch: WeightBatch) -> WeightBatch:
        """decode(encode(w))."""
        return self.decode(self.encode(batch), batch.layout.task.name)

    @torch.no_grad()
    def context(self, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
        """CAML's class outputs (classes, width) of a support set.

        Args:
            images: (K, c, H, W), uint8 or floats in [0, 1].
            labels: (K,), every class from 0 at least once.

        Raises:
            FlownError: images or labels are unusable; the message says how.
        """
        if self.support is None:
            raise FlownError("this model was fitted without context (context.mode none)")
        count = int(labels.max()) + 1 if labels.numel() else 0
        images, labels = data.check_support(images, labels, max(count, 1))
        if count > self.classes or (self.config.context.mode == "ordered" and count < self.classes):
            raise FlownError(
                f"support set: has {count} classes, the model generates networks of {self.classes}"
            )
        generator = torch.Generator().manual_seed(seed)
        images, labels = images.to(self.device), labels.to(self.device)
        outputs = self.support.encode(images, labels, count, generator)
        return nn.functional.pad(outputs, (0, 0, 0, self.classes - count))

    @torch.no_grad()
    def recognise(self, images: Tensor, labels: Tensor, seed: int = 0) -> str:
        """The known task that a support set is like; its activation and preprocessing are used.

        It is the one whose contexts lie nearest. Out of reach of all, that says little: then it is
        the one some of whose networks do best on the support set itself, if any do better than
        guessing, by two standard errors.

        Raises:
            FlownError: as `context`.
        """
        return self._recognised(self.context(images, labels, seed), images, labels, seed)

    def _recognised(self, context: Tensor, images: Tensor, labels: Tensor, seed: int) -> str:
        assert self.known is not None
        nearest, within = self.known.nearest(context)
        count = int(labels.max()) + 1
        others = [x.task.name for x in self.joint.layouts if len(x.task.classes) == count]
        if within or len(others) < 2:
            return self.tasks[nearest]
        seen = images if images.dtype == torch.uint8 else (255 * images).round().to(torch.uint8)
        solver = "euler" if self.config.flow.process == "flow" else "ddim"

        def accuracy(task: str) -> float:
            some = self.generate(images, labels, _TRIED, seed, solver, 20, task=task)
            ready = some.calibrated(seen, 1, len(seen))
            return float(evaluate(ready, seen.to(self.device), labels).mean())

        found = {task: accuracy(task) for task in others}
        best, guessing = max(found, key=lambda task: found[task]), 1 / count
        better = 2 * (guessing * (1 - guessing) / len(labels)) ** 0.5
        return best if found[best] > 100 * (guessing + better) else self.tasks[nearest]

    @torch.no_grad()
    def sample(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        n: int = 50,
        seed: int = 0,
        solver: str = "euler",
        steps: int = 100,
        guidance: float = 1.0,
        task: str | None = None,
        trajectory: bool = False,
        until: float | None = None,
    ) -> Samples:
        """Generates n networks for a support set, with everything that led to them.

        Args:
            images, labels: the support set; None only for a model without context.
            task: which task's metadata (activation, preprocessing) and tensor shapes the networks
                get; recognised from the context when None.
            solver: `euler` and others for a flow, `ddpm` or `ddim` for a diffusion.
            guidance: classifier-free guidance scale; needs `velocity.context_dropout` in training.
            trajectory: keep the latents of all steps.
            until: stop at this epoch, with its share of the steps; of a model whose `flow.path` leads
                through epochs.

        Raises:
            FlownError: n < 1, bad support set, a solver unknown or not of this model, unknown task
                or epoch.
        """
        if n < 1:
            raise FlownError(f"n: at least one network must be asked for, got {n}")
        if guidance != 1.0 and not self.config.velocity.context_dropout:
            raise FlownError("guidance: the model was trained without velocity.context_dropout")
        vector = None
        if self.head is not None and self.known is not None:
            if images is None or labels is None:
                raise FlownError("this model needs a support set: images and labels")
            context = self.context(images, labels, seed)
            task = task or self._recognised(context, images, labels, seed)
            vector = self.head(self.known.familiar(context, self._task(task))[None])
        elif task is None:
            task = self.tasks[0]
        end = 1.0 if until is None else time_of(until, self.epochs)
        start = time.perf_counter()
        generator = torch.Generator(self.device).manual_seed(seed)
        rows = torch.full((n,), self._task(task), device=self.device)
        x0 = self.source().sample(rows, generator)
        velocity = self._velocity(vector, guidance)
        process = self.config.flow.process
        solution = solve(process, velocity, x0, solver, steps, generator, trajectory, end)
        batch = self.decode(solution.x, task)
        seconds = time.perf_counter() - start
        batch.provenance |= {
            "generator": f"flown {__version__}",
            "seed": seed,
            "solver": solver,
            "steps": steps,
            "nfe": solution.nfe,
            "guidance": guidance,
            "task": task,
        } | ({} if until is None else {"until": until})
        return Samples(batch, solution.x, x0, solution.path, solution.times, solution.nfe, seconds)

    def _velocity(self, context: Tensor | None, guidance: float) -> Callable[..., Tensor]:
        if context is None:
            return self.velocity.bind()
        return flow.guided(self.velocity, context, guidance)

    def generate(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        n: int = 50,
        seed: int = 0,
        solver: str = "euler",
        steps: int = 100,
        guidance: float = 1.0,
        task: str | None = None,
        until: float | None = None,
    ) -> WeightBatch:
        """Generates n networks for a support set; arguments as in `sample`."""
        return self.sample(
            images, labels, n, seed, solver, steps, guidance, task, until=until
        ).batch

    def _save_pretrained(self, save_directory: Path) -> None:
        context: dict[str, Tensor] = {}
        if self.support is not None and self.head is not None and self.known is not None:
            context = modelfiles.prefixed({"support": self.support, "head": self.head})
            context |= {"prototypes": self.known.means, "reach": self.known.reach}
        prior = {f"prior.{k}": v for k, v in self.prior.items()}
        rests = {f"rest.{i}.{k}": v for i, x in enumerate(self.rests) for k, v in x.items()}
        parts = {
            "encoder": modelfiles.prefixed(
                {"encoder": self.encoder, "standardizer": self.standardizer}
            )
            | rests,
            "flow": modelfiles.prefixed({"velocity": self.velocity}) | prior,
            "context": context,
        }
        values = {
            "flown": __version__,
            "config": self.config.model_dump(mode="json"),
            "layouts": [layout.model_dump(mode="json") for layout in self.joint.layouts],
            "support": self.support and self.support.config.model_dump(mode="json"),
            "epochs": self.epochs,
            "card": self.card,
        }
        modelfiles.write(save_directory, parts, values, modelcard.render(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Flown:
        """Loads a model: a folder, the name of a shipped model, or a hub id.

        Raises:
            FlownError: no such model, a file of it is missing, broken or of another model.
        """
        path = modelfiles.locate(str(pretrained_model_name_or_path), **kwargs)
        values, parts = modelfiles.read(path)
        config = FlownConfig.parse(values["config"], f"{path}/config.json")
        layouts = [WeightLayout.parse(v, f"{path}/config.json") for v in values["layouts"]]
        model = cls(config, JointLayout.of(layouts), modelfiles.floats("prior", parts["flow"]))

        def fill(module: nn.Module, name: str, part: str) -> None:
            modelfiles.fill(module, name, parts[part], path / f"{part}.safetensors")

        fill(model.encoder, "encoder", "encoder")
        fill(model.standardizer, "standardizer", "encoder")
        fill(model.velocity, "velocity", "flow")
        model.rests = modelfiles.rests(parts["encoder"], len(layouts))
        if config.context.mode != "none":
            model.support = SupportEncoder.from_values(values["support"])
            fill(model.support, "support", "context")
            model.head = ContextHead(model.classes, model.support.width, mode=config.context.mode)
            fill(model.head, "head", "context")
            model.known = KnownTasks(
                *modelfiles.take(path, parts["context"], "prototypes", "reach")
            )
        model.card = values.get("card", {})
        model.epochs = tuple(values.get("epochs", ()))
        return model.eval().requires_grad_(False)
