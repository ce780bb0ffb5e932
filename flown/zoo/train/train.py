"""Training a zoo: shard by shard, here or on a cluster, resumable."""

from __future__ import annotations

from pathlib import Path

from flown import nets
from flown import tasks as data
from flown.base import trust
from flown.base.errors import FlownError
from flown.base.files import begin, begun, prepare_output
from flown.base.progress import bar
from flown.nets import subsets
from flown.version import __version__
from flown.weights.layout import Task, WeightLayout
from flown.zoo.rows import read_rows
from flown.zoo.store import Zoo
from flown.zoo.train.base import Base, start_file
from flown.zoo.train.cluster import train_shards
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
    images: data.ImageData | None = None,
    ray: str | None = None,
) -> Zoo:
    """Trains `models` networks by a recipe and writes the zoo.

    Args:
        recipe: a recipe or its name; `scale` is for names. A network that it names as
            `package.module:function` is imported and called.
        held_out: the share of networks (by seed) kept from everything that learns from the zoo.
        images: the data, where `recipe.dataset` is not a name that `flown.tasks` knows.
        resume: continue a training that was interrupted; it ends with the same weights.
        ray: train shards on a Ray cluster: `auto` starts one here, an address joins one.

    Raises:
        FlownError: fewer than two models (one will do where several checkpoints are kept, the last
            of which are held out), unknown names, `out` exists, or is another zoo's.
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
    out = prepare_output(out, overwrite, resume)
    held = begun(out)
    order = None if held is None else held.pop("classes", None)
    if held not in (None, plan.json()):
        raise FlownError(f"{out}: holds a zoo begun with another recipe, seed or number of models")
    if resume and (out / "zoo.json").exists():
        return _finished(out, plan)
    images = images or data.load(recipe.dataset)
    if order is not None:
        images = data.in_order(images, order, str(out))
    layout = layout_for(recipe, images)
    begin(out, {**plan.json(), "classes": list(images.classes)})
    if recipe.subset is not None:
        base = Base(recipe, layout, images, out, plan.base_seed, device)
        with bar(f"base of {recipe.name}", recipe.base_epochs) as update:
            for epoch in base.epochs():
                update(epoch, base.note)
    if ray is not None:
        with bar(f"zoo {recipe.name}", len(plan.shards)) as update:
            train_shards(plan, layout, images, out, ray, device, update)
        return finish(plan, layout, out)
    with bar(f"zoo {recipe.name}", recipe.epochs * len(plan.shards)) as update:
        for index in range(len(plan.shards)):
            shard = Shard(plan, layout, images, out, index, device)
            for epoch in shard.epochs():
                update(index * recipe.epochs + epoch, shard.note)
    return finish(plan, layout, out)


def _finished(out: Path, plan: Plan) -> Zoo:
    """The zoo that is there, if it is the plan's."""
    zoo = Zoo.open(out)
    wanted = {plan.recipe.dataset: plan.json()["recipe"]}, plan.seed, plan.models
    if wanted != (
        zoo.about.get("recipes"),
        zoo.about.get("seed"),
        len({x.model for x in zoo.rows}),
    ):
        raise FlownError(f"{out}: holds a zoo of another recipe, seed or number of models")
    return zoo


def finish(plan: Plan, layout: WeightLayout, out: Path) -> Zoo:
    """Joins the shards' indices to the zoo's and clears what was only for resuming."""
    parts = sorted(out.glob("index-*.jsonl"))
    rows = split_rows(plan, [row for part in parts for row in read_rows(part)])
    about = {
        "recipes": {layout.task.name: plan.json()["recipe"]},
        "seed": plan.seed,
        "flown": __version__,
    }
    zoo = Zoo.write(out, [layout], rows, about)
    begun = out.glob("progress-*.safetensors")  # of shards that a cluster then trained
    for scratch in [out / "progress.json", start_file(out), *begun, *parts]:
        scratch.unlink(missing_ok=True)
    return zoo


def layout_for(recipe: Recipe, images: data.ImageData) -> WeightLayout:
    """The layout, task metadata included, of the networks that a recipe trains."""
    recipe.check()
    channels = 1 if recipe.grey else images.train.images.shape[1]
    task = Task(
        name=recipe.dataset,
        channels=channels,
        size=recipe.size or nets.input_size(recipe.net),
        mean=recipe.mean,
        std=recipe.std,
        classes=images.classes,
        activation=recipe.activation,
    )
    net = nets.build(recipe.net, channels, len(images.classes), recipe.activation, task.size)
    chosen = None if recipe.subset is None else subsets.patterns(net, recipe.subset)
    return WeightLayout.of(net, recipe.net, task, chosen)
