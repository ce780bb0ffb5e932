"""Commands on zoos."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.errors import FlownError
from flown.base.terminal import print_table, say
from flown.cli.options import (
    MOST,
    Device,
    Out,
    Overwrite,
    Resume,
    Scale,
    ScaleOption,
    Seed,
    Trust,
    ZooPath,
    console,
    device_of,
    wrote,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Populations of trained networks.",
    epilog="Example: flown zoo train demo-digits --models 16 --out zoo",
)


@app.command("train", epilog="Example: flown zoo train demo-digits --models 16 --out zoo")
def zoo_train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file of its keys.")],
    out: Out,
    models: Annotated[int, typer.Option(min=1, max=MOST, help="How many networks to train.")] = 100,
    scale: ScaleOption = Scale.cpu,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    ray: Annotated[
        Optional[str],
        typer.Option(help="Train on a Ray cluster: `auto` starts one here, an address joins one."),
    ] = None,
) -> None:
    """Train many networks at once by a recipe.

    A recipe whose `net` is package.module:function runs that code: read a recipe before you use it.
    """
    from flown import zoo
    from flown.report.population import zoo_table
    from flown.zoo import Recipe

    chosen = Recipe.load(recipe) if Path(recipe).is_file() else recipe
    made = zoo.train_zoo(
        chosen,
        models,
        out,
        scale=scale.value,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        device=device_of(device),
        ray=ray,
    )
    print_table(console, "", zoo_table(made))
    wrote(out)


@app.command("inspect", epilog="Example: flown zoo inspect zoo --report zoo.html")
def zoo_inspect(
    path: ZooPath,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights; exit with 1 if any is damaged.")
    ] = False,
    report: Annotated[
        Optional[Path], typer.Option(help="An HTML file for tables and figures.")
    ] = None,
    overwrite: Overwrite = False,
    trust: Trust = None,
) -> None:
    """Accuracies, distances, duplicates, dead units and damage of a zoo."""
    from flown.base.output import OutputFile
    from flown.report import population as reports
    from flown.zoo import Zoo
    from flown.zoo.inspect.population import describe

    page = None if report is None else OutputFile(report, overwrite)
    zoo = Zoo.open(path)
    reports.print_accuracies(zoo, console)
    if verify and (damage := zoo.verify()):
        for line in damage:
            say(console, line)
        raise typer.Exit(1)
    population = describe(zoo, everything=verify)
    reports.print_population(population, console)
    if verify:
        say(console, f"{len(zoo)} checkpoints read, all as written")
    if page is not None:
        reports.write_population(page.path, zoo, population)
        wrote(page.path)


class Format(str, Enum):
    """What a folder of checkpoints holds."""

    checkpoints = "checkpoints"
    modelzoos = "modelzoos"
    matrix = "matrix"


@app.command(
    "import",
    epilog=(
        "Example: flown zoo import runs --format checkpoints --net cnn-small --data digits --out zoo"
    ),
)
def zoo_import(
    path: Annotated[Path, typer.Argument(help="A file or folder of checkpoints.")],
    out: Out,
    net: Annotated[
        str, typer.Option(help="A network's name, or package.module:function, which is run.")
    ],
    data: Annotated[
        str, typer.Option(help="The data set, or folder, that the networks were trained on.")
    ],
    form: Annotated[
        Format,
        typer.Option(
            "--format", help="State dicts, trials of Model Zoos, or weights.npy with layout.csv."
        ),
    ] = Format.checkpoints,
    mapping: Annotated[
        Optional[Path],
        typer.Option(help="YAML or JSON of tensor names, theirs: ours; null drops a tensor."),
    ] = None,
    key: Annotated[
        Optional[str],
        typer.Option(
            help="Where in a file the weights lie, if it has several: `ema`, `teacher.net`."
        ),
    ] = None,
    pattern: Annotated[
        Optional[str],
        typer.Option(
            help="Which files are one model: a regular expression of paths with groups model and "
            "epoch: `(?P<model>.+)/(?P<epoch>[0-9]+)`."
        ),
    ] = None,
    rest: Annotated[
        Optional[Path],
        typer.Option(
            help="A state dict of a whole network, where the checkpoints hold only some tensors."
        ),
    ] = None,
    epochs: Annotated[
        Optional[list[int]],
        typer.Option("--epoch", help="Only this epoch of Model Zoos' trials; repeat for several."),
    ] = None,
    activation: Annotated[str, typer.Option(help="Activation of the networks.")] = "tanh",
    mean: Annotated[
        str,
        typer.Option(
            help="Mean that pixels in [0, 1] were scaled by; `0.485,0.456,0.406` by channel."
        ),
    ] = "0.5",
    std: Annotated[
        str, typer.Option(help="Deviation that they were scaled by, in the same way.")
    ] = "0.5",
    size: Annotated[
        Optional[int], typer.Option(help="Side of the images; by default the data set's.")
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Colour images are made grey.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """A zoo from other people's checkpoints: state dicts, sharded or not, or Model Zoos' trials.

    Activation and preprocessing are not in the weights: give those that they were trained with.
    Pickles are opened as weights only; one that would run code is refused and named.
    """
    from flown.base.files import read_json
    from flown.report.imports import import_lines
    from flown.report.population import zoo_table
    from flown.tasks import Task, load
    from flown.zoo import Recipe, from_checkpoints, from_matrix, from_modelzoos
    from flown.zoo.train.train import layout_for

    only = {"--key": key, "--pattern": pattern, "--rest": rest}
    for option, value in only.items():
        if value is not None and form is not Format.checkpoints:
            raise FlownError(f"{option} is for --format checkpoints")
    if mapping is not None and form is Format.modelzoos:
        raise FlownError("--mapping is for --format checkpoints and matrix")
    if epochs and form is not Format.modelzoos:
        raise FlownError("--epoch is for --format modelzoos")
    values = {
        "dataset": data,
        "net": net,
        "activation": activation,
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
        "size": size,
        "grey": grey,
    }
    about = Recipe.parse({"name": "import", **values}, "zoo import")
    images = load(data, size=size)
    architecture = layout_for(about, images).architecture
    task = Task(id=data, dataset=data, classes=images.classes)
    if form is Format.modelzoos:
        made, _ = from_modelzoos(
            path, architecture, task, out, epochs=epochs, seed=seed, overwrite=overwrite
        )
    elif form is Format.matrix:
        made, _ = from_matrix(
            path, architecture, task, out, mapping=mapping, seed=seed, overwrite=overwrite
        )
    else:
        made, _ = from_checkpoints(
            path,
            architecture,
            task,
            out,
            mapping=mapping,
            key=key,
            pattern=pattern,
            rest=rest,
            seed=seed,
            overwrite=overwrite,
        )
    print_table(console, "", zoo_table(made))
    for line in import_lines(read_json(out / "import.json")):
        say(console, line)
    wrote(out)


def _numbers(option: str, text: str) -> float | tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise FlownError(
            f"{option} {text!r}: expected a number, or one a channel: 0.485,0.456,0.406"
        ) from None
    return found if len(found) > 1 else found[0]


@app.command("align", epilog="Example: flown zoo align zoo --out aligned")
def zoo_align(
    path: ZooPath,
    out: Out,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    pairs: Annotated[
        int, typer.Option(help="How many pairs of networks have their midpoint measured.")
    ] = 100,
    trust: Trust = None,
) -> None:
    """Bring a zoo's networks into one order of units and signs; their outputs stay the same."""
    from flown.experiments.alignment import compare
    from flown.zoo import Zoo, align_zoo

    source = Zoo.open(path)
    made = align_zoo(source, out, seed=seed, overwrite=overwrite)
    head = ["task", "pairwise distance", "networks %", "midpoints of pairs %", "mean of all %"]
    body = []
    for task, before, after in compare(source, made, pairs, seed):
        figures = (
            f"{getattr(before, k):.1f} -> {getattr(after, k):.1f}"
            for k in ("distance", "models", "midpoints", "mean")
        )
        body.append([task, *figures])
    print_table(console, "", (head, body))
    wrote(out)


@app.command("convert", epilog="Example: flown zoo convert old-zoo --out zoo")
def zoo_convert(path: ZooPath, out: Out, overwrite: Overwrite = False, trust: Trust = None) -> None:
    """Convert a zoo of flown 0.1 to today's format; its weights do not change."""
    from flown.zoo.convert import convert

    made = convert(path, out, overwrite)
    say(console, f"{len(made)} checkpoints for {len(made.tasks)} tasks")
    wrote(out)


@app.command("join", epilog="Example: flown zoo join zoo-a zoo-b --out zoo")
def zoo_join(
    paths: Annotated[list[Path], typer.Argument(metavar="ZOOS", help="The folders of zoos.")],
    out: Out,
    overwrite: Overwrite = False,
    epochs: Annotated[
        Optional[list[int]],
        typer.Option(
            "--epoch", help="Only this epoch, -1 the last of each task; repeat for several."
        ),
    ] = None,
    trust: Trust = None,
) -> None:
    """Put zoos of several tasks into one folder, for one generator."""
    from flown.report.population import zoo_table
    from flown.zoo import Zoo

    zoos = [Zoo.open(path).select(epochs=epochs) for path in paths]
    print_table(console, "", zoo_table(Zoo.join(zoos, out, overwrite)))
    wrote(out)
