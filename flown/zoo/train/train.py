"""Training a zoo: shard by shard, here or on a cluster, resumable."""

from __future__ import annotations

from pathlib import Path

from flown import nets
from flown import tasks as data
from flown.base import trust
from flown.base.config import read_mapping
from flown.base.errors import FlownError
from flown.base.files import save_tensors
from flown.base.progress import bar
from flown.base.run import Run
from flown.nets import subsets
from flown.nets.architecture import Architecture
from flown.nets.batched import batchnorm
from flown.tasks import TaskTable
from flown.version import __version__
from flown.weights import construction
from flown.weights.layout import WeightLayout
from flown.zoo.rows import read_rows
from flown.zoo.store import Zoo, frozen_file
from flown.zoo.train.base import Base, start_file
from flown.zoo.train.cluster import train_shards
from flown.zoo.train.lessons import lessons
from flown.zoo.train.recipes import Recipe
from flown.zoo.train.recipes import recipe as recipe_by_name
from flown.zoo.train.shard import Plan, Shard, split_rows


def train_zoo(
    recipe: Recipe | str,
    models: int,
    out: Path | str,
    *,
    scale: str = "cpu",
    seed: int = 0,
    held_out: float = 1 / 6,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    images: data.ImageData | data.ManyClass | None = None,
    ray: str | None = None,
) -> Zoo:
    """Trains `models` networks by a recipe and writes the zoo.

    Args:
        recipe: a recipe or its name; `scale` applies to names. A network that it names as
            `package.module:function` is imported and called.
        held_out: the share of networks (by seed) kept from everything that learns from the zoo.
        images: the data, where `recipe.dataset` is not a name that `flown.tasks` knows.
        resume: continue a training that was interrupted; it ends with the same weights.
        ray: train shards on a Ray cluster: `auto` starts one here, an address joins one.

    Raises:
        FlownError: fewer than two models (a single one needs several checkpoints, the last of which
            are held out), unknown names, `out` exists, or is another zoo's.
        TrainingError: a network diverged (named by its seed).
    """
    recipe = recipe_by_name(recipe, scale) if isinstance(recipe, str) else recipe
    trust.allow(recipe.net)
    lone = len({*recipe.keep, *recipe.keep_steps}) > 1
    if models < (1 if lone else 2):
        raise FlownError(
            f"a zoo needs at least 2 models (one to train on, one held out), got {models}; "
            "one will do where several checkpoints are kept"
        )
    plan = Plan(recipe, models, seed, held_out)
    run = Run(
        out,
        plan.json(),
        resume=resume,
        overwrite=overwrite,
        configs={"recipe": Recipe},
        file="progress.json",
    )
    out = run.path
    if resume and (out / "zoo.json").exists():
        return _finished(run, recipe)
    if images is None:
        many = recipe.tasks is not None
        if many:
            images = data.load_many(recipe.dataset)
        else:
            images = data.load(recipe.dataset, size=recipe.size)
    if resume and run.file.exists() and isinstance(images, data.ImageData):
        held = read_mapping(run.file).get("classes", images.classes)
        images = data.in_order(images, held, str(out))
    layout = layout_for(recipe, images)
    run.plan["classes"] = None if recipe.tasks else list(images.classes)
    run.begin()
    if recipe.subset is None and (shared := construction.drawn_once(layout, plan.base_seed)):
        save_tensors(frozen_file(out, 0), shared)
    if recipe.subset is not None:
        base = Base(recipe, layout, images, out, plan.base_seed, device)
        with bar(f"base of {recipe.name}", recipe.base_epochs) as update:
            for epoch in base.epochs():
                update(epoch, base.note)
    if ray is not None:
        with bar(f"zoo {recipe.name}", len(plan.shards)) as update:
            train_shards(plan, layout, images, out, ray, device, update)
        return finish(plan, layout, images, out)
    with bar(f"zoo {recipe.name}", recipe.epochs * len(plan.shards)) as update:
        for index in range(len(plan.shards)):
            shard = Shard(plan, layout, images, out, index, device)
            for epoch in shard.epochs():
                update(index * recipe.epochs + epoch, shard.note)
    return finish(plan, layout, images, out)


def _finished(run: Run, recipe: Recipe) -> Zoo:
    """The existing zoo, if this run made it."""
    zoo = Zoo.open(run.path)
    found = {
        "recipe": zoo.about.get("recipes", {}).get(recipe.dataset),
        "seed": zoo.about.get("seed"),
        "models": len({row.model for row in zoo.rows}),
    }
    run.check({**run.plan, **found}, run.path / "zoo.json")
    return zoo


def finish(
    plan: Plan, layout: WeightLayout, images: data.ImageData | data.ManyClass, out: Path
) -> Zoo:
    """Joins the indices of the shards and removes files that only resuming needed."""
    parts = sorted(out.glob("index-*.jsonl"))
    known = lessons(plan.recipe, images, plan.seed)
    tasks = TaskTable({t.id: t for t in map(known.task, range(plan.models))}.values())
    rows = split_rows(plan, [row for part in parts for row in read_rows(part)], tasks)
    about = {
        "recipes": {plan.recipe.dataset: plan.json()["recipe"]},
        "seed": plan.seed,
        "flown": __version__,
    }
    zoo = Zoo.write(out, [layout], tasks.values(), rows, about)
    begun = out.glob("progress-*.safetensors")  # progress of shards that a cluster then trained
    for scratch in [out / "progress.json", start_file(out), *begun, *parts]:
        scratch.unlink(missing_ok=True)
    return zoo


def layout_for(recipe: Recipe, images: data.ImageData | data.ManyClass) -> WeightLayout:
    """The layout of the networks that a recipe trains."""
    recipe.check()
    known = lessons(recipe, images, seed=0)
    channels = 1 if recipe.grey else known.channels
    values = {
        "net": recipe.net,
        "channels": channels,
        "size": recipe.size or nets.input_size(recipe.net),
        "outputs": known.classes,
        "activation": recipe.activation,
        "mean": recipe.mean,
        "std": recipe.std,
    }
    architecture = Architecture.parse(values, recipe.name)
    net = architecture.build()
    if not any(True for _ in net.parameters()):
        raise FlownError(f"network '{recipe.net}': has no parameters")
    if recipe.tasks is not None and batchnorm.layers(net):
        raise FlownError(
            f"{recipe.name}: '{recipe.net}' has BatchNorm, whose statistics networks of random tasks "
            "do not share; choose a network without"
        )
    chosen = None if recipe.subset is None else subsets.patterns(net, recipe.subset)
    return WeightLayout.of(net, architecture, chosen)
