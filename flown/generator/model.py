"""Flown: weight encoder + support-set context + conditional flow, as one model.

    support set --class tokens, head--> c (128,)
    x_0 ~ p_0 --dx = v(x, t; c) dt, t: 0 -> 1--> x_1 (4, 4, 4) --decode, unscale--> weights (D,)

On disk a model is a folder: `config.json` (written last), `tasks.jsonl`, `encoder.safetensors`,
`flow.safetensors`, `context.safetensors` and `README.md`, the model card. Where a model generates a
subset of tensors, `encoder.safetensors` also holds the tensors that the networks of layout k share,
as `rest.<k>.<name>`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from flown import encoders, flow, tasks
from flown.anytask.model import AnyTask
from flown.base.errors import FlownError
from flown.base.files import read_json, write_json
from flown.base.memory import check_fits
from flown.base.run import Run, digest
from flown.base.seeding import seeded
from flown.context import SupportEncoder
from flown.context.support import TOKENS, pick_queries, token_width
from flown.context.tokens import Contexts, Images
from flown.flow.marginals import time_of
from flown.flow.samplers import Samples, solve
from flown.generator import files, modelcard
from flown.generator.config import FlownConfig
from flown.generator.data import TrainingSet
from flown.generator.fit import (
    FlowParts,
    check_flow,
    fit_encoder,
    fit_flow,
    flow_parts,
    load_prior,
)
from flown.generator.space import LatentSpace
from flown.tasks import Task, TaskTable
from flown.training import History
from flown.version import __version__
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, WeightLayout, layouts_in
from flown.weights.scale import NetworkScale
from flown.zoo import Zoo


class Flown(nn.Module, ModelHubMixin):
    """A trained generator of weights. Made by `Flown.fit` or `Flown.from_pretrained`.

    `tasks` are those of training; generation does not use them. `epochs` are those that the flow's
    path leads through, if any.
    """

    def __init__(
        self,
        config: FlownConfig,
        space: LatentSpace,
        parts: FlowParts,
        support: SupportEncoder | None,
        tasks: TaskTable,
        prior: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.config, self.space, self.tasks = config, space, tasks
        self.velocity, self.head, self.form = parts.velocity, parts.head, parts.form
        self.epochs, self.support, self.prior = tuple(parts.epochs), support, dict(prior)
        self.history: dict[str, History] = {}
        self.card: dict[str, Any] = {}
        self.eval().requires_grad_(False)

    @property
    def classes(self) -> int:
        """The largest number of classes."""
        return self.space.joint.outputs

    @property
    def device(self) -> torch.device:
        return self.space.device

    @classmethod
    def fit(
        cls,
        zoo: Zoo,
        config: FlownConfig | None = None,
        *,
        out: Path | str,
        images: Images | None = None,
        resume: bool = False,
        overwrite: bool = False,
        device: str = "cpu",
    ) -> Flown:
        """Trains encoder and flow on a zoo and saves the model under `out/model`.

        Args:
            zoo: networks of any tasks, split into train and held-out.
            images: by data set; loaded by the data sets' names otherwise.
            out: the run's folder: checkpoints, `run.json`, `model/`.
            resume: go on from the checkpoints in `out`; ends with the same weights.

        Raises:
            FlownError: `out` exists or belongs to another run; the zoo has a NaN model (named).
            TrainingError: a loss became NaN.
        """
        config = config or FlownConfig()
        prior = load_prior(config)
        names = sorted({task.dataset for task in zoo.tasks.values()})
        images = images or {name: tasks.load_any(name) for name in names}
        run = Run(
            out,
            {
                "config": config.model_dump(mode="json"),
                "zoo": zoo.identity,
                "images": {name: images[name].identity for name in names if name in images},
                "prior": digest(*prior.values()) if prior else None,
            },
            resume=resume,
            overwrite=overwrite,
            configs={"config": FlownConfig},
            newer=("images", "prior"),
            sources=[zoo.path],
        )
        out = run.path
        if resume and (out / "model" / "config.json").exists():
            model: Flown = cls.from_pretrained(str(out / "model"))
            model.history = read_json(out / "history.json")
            return model.to(device)
        networks = TrainingSet.of(zoo, config.epochs)
        check_flow(config)
        support = contexts = None
        if config.context.mode != "none":
            support = SupportEncoder.pretrained().to(device)
            known = list(networks.tasks.values())
            contexts = Contexts(support, known, images, config.context, networks.joint.outputs)
        run.begin()
        encoder, encoder_history = fit_encoder(networks, config, images, out, resume, device)
        scale = copy.deepcopy(networks.scale)
        space = LatentSpace(networks.joint, scale, encoder, networks.frozen).to(device)
        source = space.source(config, prior)
        parts = fit_flow(networks, space, source, contexts, config, out, resume, device)
        model = cls(config, space, parts, support, networks.tasks, prior)
        model.history = {"encoder": encoder_history, "flow": parts.history}
        write_json(out / "history.json", model.history)
        model.save_pretrained(str(out / "model"))
        return model

    def context(self, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
        """The class tokens (classes, width) of a support set; zeros stand for classes it lacks.

        Args:
            images: (K, c, H, W), uint8 or floats in [0, 1].
            labels: (K,), every class from 0 at least once.

        Raises:
            FlownError: images or labels are unusable; the message says how.
        """
        if self.support is None:
            raise FlownError("this model was fitted without context (context.mode none)")
        count = int(labels.max()) + 1 if isinstance(labels, Tensor) and labels.numel() else 0
        images, labels = tasks.check_support(images, labels, max(count, 1))
        if count > self.classes:
            raise FlownError(
                f"support set: has {count} classes, the model generates networks of at most "
                f"{self.classes}"
            )
        features = self.support.features(images.to(self.device))
        queries = pick_queries(labels, count, torch.Generator().manual_seed(seed)).to(self.device)
        encode = TOKENS[self.config.context.tokens]
        tokens = encode(self.support, features[None], labels.to(self.device), queries[None])[0]
        return nn.functional.pad(tokens, (0, 0, 0, self.classes - count))

    @torch.no_grad()
    def asked_layout(
        self, images: Tensor | None = None, labels: Tensor | None = None, seed: int = 0
    ) -> int:
        """The place of the model's layout that suits a support set.

        Raises:
            FlownError: as `context`.
        """
        return self._layout(*self._condition(images, labels, seed))

    def _condition(
        self, images: Tensor | None, labels: Tensor | None, seed: int
    ) -> tuple[Tensor | None, int | None]:
        """The context (1, 128) of a support set and its number of classes; None without context."""
        if self.head is None:
            return None, None
        if images is None or labels is None:
            raise FlownError("this model needs a support set: images and labels")
        context = self.head(self.context(images, labels, seed)[None])
        return context, int(labels.max()) + 1

    def _layout(self, context: Tensor | None, count: int | None) -> int:
        """The layout that suits a context (1, 128), among those of `count` outputs."""
        layouts = self.space.joint.layouts
        fitting = [
            i for i, x in enumerate(layouts) if count is None or x.architecture.outputs == count
        ]
        if not fitting:
            known = sorted({x.architecture.outputs for x in layouts})
            raise FlownError(
                f"support set: has {count} classes, the model generates networks of "
                f"{', '.join(map(str, known))}"
            )
        if context is None or self.form is None:
            return fitting[0]
        scores = self.form(context)[0]
        return max(fitting, key=lambda i: float(scores[i]))

    @torch.no_grad()
    def sample(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        n: int = 50,
        seed: int = 0,
        solver: str = "euler",
        steps: int | None = None,
        guidance: float = 1.0,
        layout: int | None = None,
        trajectory: bool = False,
        until: float | None = None,
        classes: Sequence[str] | None = None,
    ) -> Samples:
        """Generates n networks for a support set, with latents, context and cost.

        Args:
            images: of the support set; None only for a model without context. labels: theirs.
            solver: `euler` and others for a flow, `ddpm` or `ddim` for a diffusion.
            steps: of the solver, by default `config.flow.steps`.
            guidance: classifier-free guidance scale; needs `velocity.context_dropout` in training.
            layout: which of the model's layouts (architecture, preprocessing) the networks have, by
                its place; by default the one that suits the support set.
            trajectory: keep the latents of all steps.
            until: stop at this epoch, with its share of the steps, if the model's `flow.path` leads
                through epochs.
            classes: names of the labels, kept with the networks; "0", "1", ... when None.

        Raises:
            FlownError: n < 1, bad support set, a solver unknown or not of this model, no such layout
                or epoch.
        """
        steps = self.config.flow.steps if steps is None else steps
        if n < 1:
            raise FlownError(f"n: at least one network must be asked for, got {n}")
        if guidance != 1.0 and not self.config.velocity.context_dropout:
            raise FlownError("guidance: the model was trained without velocity.context_dropout")
        if layout is not None and not 0 <= layout < len(self.space.joint.layouts):
            raise FlownError(
                f"layout {layout} is out of range 0..{len(self.space.joint.layouts) - 1}"
            )
        context, count = self._condition(images, labels, seed)
        if layout is None:
            layout = self._layout(context, count)
        check_fits(n, self.space.joint.layouts[layout].size, "networks")
        end = 1.0 if until is None else time_of(until, self.epochs)
        start = time.perf_counter()
        generator = torch.Generator(self.device).manual_seed(seed)
        x0 = self.source().sample(torch.full((n,), layout, device=self.device), generator)
        velocity = self._velocity(context, guidance)
        process = self.config.flow.process
        solution = solve(process, velocity, x0, solver, steps, generator, trajectory, end)
        batch = self.space.decode(solution.x, layout)
        seconds = time.perf_counter() - start
        outputs = batch.layout.architecture.outputs
        names = tuple(classes) if classes is not None else tuple(map(str, range(outputs)))
        batch.task = Task(id="support set", dataset="support set", classes=names, split="test")
        batch.provenance |= {
            "generator": f"flown {__version__}",
            "seed": seed,
            "solver": solver,
            "steps": steps,
            "nfe": solution.nfe,
            "guidance": guidance,
        } | ({} if until is None else {"until": until})
        return Samples(batch, solution.x, x0, solution.path, solution.times, solution.nfe, seconds)

    def generate(
        self,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        n: int = 50,
        seed: int = 0,
        solver: str = "euler",
        steps: int | None = None,
        guidance: float = 1.0,
        layout: int | None = None,
        until: float | None = None,
        classes: Sequence[str] | None = None,
    ) -> WeightBatch:
        """Generates n networks for a support set; arguments as in `sample`."""
        return self.sample(
            images,
            labels,
            n,
            seed,
            solver,
            steps,
            guidance,
            layout,
            until=until,
            classes=classes,
        ).batch

    def _velocity(self, context: Tensor | None, guidance: float) -> Callable[..., Tensor]:
        if context is None:
            return self.velocity.bind()
        return flow.guided(self.velocity, context, guidance)

    def source(self) -> flow.Source:
        """The flow's source distribution p0."""
        return self.space.source(self.config, self.prior)

    @torch.no_grad()
    def encode(self, batch: WeightBatch) -> Tensor:
        """Networks of one of the model's layouts to standardised latents (n, *latent_shape)."""
        return self.space.encode(batch)

    def decode(self, latents: Tensor, layout: int = 0) -> WeightBatch:
        """Latents (n, *latent_shape) to networks of a layout, as `LatentSpace.decode`."""
        return self.space.decode(latents, layout)

    @torch.no_grad()
    def reconstruct(self, batch: WeightBatch) -> WeightBatch:
        """decode(encode(w))."""
        made = self.space.decode(self.space.encode(batch), self.space.place(batch.layout))
        made.task = batch.task
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        prior = {f"prior.{k}": v for k, v in self.prior.items()}
        frozen = {f"rest.{i}.{k}": v for i, x in enumerate(self.space.frozen) for k, v in x.items()}
        parts = {part: files.prefixed(m) for part, m in self._modules_by_part().items()}
        parts["encoder"] |= frozen
        parts["flow"] |= prior
        values = {
            "flown": __version__,
            "config": self.config.model_dump(mode="json"),
            "layouts": [x.model_dump(mode="json") for x in self.space.joint.layouts],
            "support": self.support and self.support.config.model_dump(mode="json"),
            "epochs": self.epochs,
            "card": self.card,
        }
        files.write(save_directory, parts, values, self.tasks, modelcard.render(self))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a model: a folder, the name of a shipped model, or a hub id.

        Returns:
            A Flown, or an `AnyTask` where the folder holds one.

        Raises:
            FlownError: no such model, a file of it is missing, broken or of another model.
        """
        path = files.locate(str(pretrained_model_name_or_path), **kwargs)
        if AnyTask.is_in(path):
            return AnyTask.from_pretrained(path)
        values, known, tensors = files.read(path)
        config = FlownConfig.parse(values["config"], f"{path}/config.json")
        layouts = layouts_in(values, path / "config.json")
        support = None
        if config.context.mode != "none":
            with seeded(config.seed):
                support = SupportEncoder.from_values(values.get("support", {}))
        frozen = files.frozen(tensors["encoder"], len(layouts))
        prior = files.floats("prior", tensors["flow"])
        model = cls.untrained(config, layouts, known, support, frozen, prior)
        model.epochs, model.card = tuple(values.get("epochs", ())), values.get("card", {})
        for part, modules in model._modules_by_part().items():
            for name, module in modules.items():
                files.fill(module, name, tensors[part], path / f"{part}.safetensors")
        return model

    @classmethod
    def untrained(
        cls,
        config: FlownConfig,
        layouts: Sequence[WeightLayout],
        tasks: TaskTable,
        support: SupportEncoder | None = None,
        frozen: Sequence[Mapping[str, Tensor]] = (),
        prior: Mapping[str, Tensor] | None = None,
    ) -> Flown:
        """A model of empty parameters, to be filled; `support` is for models with context."""
        joint = JointLayout.of(layouts)
        width = None if support is None else token_width(support, config.context.tokens)
        with seeded(config.seed):
            scale = NetworkScale(joint)
            encoder = encoders.build(config.encoder, joint, scale.size)
            space = LatentSpace(joint, scale, encoder, frozen)
            parts = flow_parts(config, space.shape, len(layouts), joint.outputs, width)
        return cls(config, space, parts, support, tasks, prior or {})

    def _modules_by_part(self) -> dict[str, dict[str, nn.Module]]:
        """The modules that each file of a model's folder holds."""
        context = {"support": self.support, "head": self.head, "form": self.form}
        return {
            "encoder": {"encoder": self.space.encoder, "scale": self.space.scale},
            "flow": {"velocity": self.velocity},
            "context": {name: module for name, module in context.items() if module is not None},
        }
