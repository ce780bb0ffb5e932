"""The command line: parse, call, print. Everything it does can be imported."""

from __future__ import annotations

import sys
import traceback
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn, Optional, TextIO

import typer
from pydantic import ValidationError

from flown.base.errors import FlownError, FlownWarning
from flown.base.terminal import print_table, say
from flown.base.text import plain
from flown.cli.adapt import adapt
from flown.cli.evaluate import evaluate
from flown.cli.export import export
from flown.cli.fewshot import fewshot
from flown.cli.finetune import finetune
from flown.cli.fit import fit
from flown.cli.generate import generate
from flown.cli.options import (
    Device,
    Out,
    Overwrite,
    Resume,
    Seed,
    console,
    device_of,
    wrote,
)
from flown.cli.play import play
from flown.cli.reproduce import reproduce
from flown.cli.zoo import app as zoo_app
from flown.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Example: flown generate --support digits --out nets.safetensors",
)
data_app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Image data by name, or folders with one sub-folder of images a class. The folder FLOWN_DATA "
        "may hold NAME.npz files: uint8 train_images (N, H, W) or (N, H, W, 3), integer train_labels, "
        "test_images, test_labels, and class_names."
    ),
    epilog="Example: flown data show digits",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(console, f"flown {__version__}")
        raise typer.Exit


@app.callback()
def flown(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Flow matching on neural-network weights: zoos, weight encoders, generated classifiers."""


@app.command(epilog="Example: flown demo --out demo-out")
def demo(
    out: Out = Path("demo-out"),
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """From nothing to generated classifiers in a few minutes, on data that dependencies ship."""
    from flown.experiments.demo import demo as run
    from flown.report import print_card
    from flown.report.anytask import accuracies

    known, unseen = run(
        out, seed=seed, resume=resume, overwrite=overwrite, device=device_of(device)
    )
    print_card(known.card, console)
    print_table(
        console,
        "Networks for digits that no training saw, without a gradient step: accuracy, %",
        accuracies(unseen),
    )
    say(console, f"{known.about['seconds']:.0f} seconds in all")
    pages = (out / "report.html", out / "unseen.html")
    wrote(out / "results.json", *pages, out / "run" / "model")


app.command(epilog="Example: flown fit --zoo zoo --out run --set encoder_training.steps=500")(fit)
app.command(epilog="Example: flown generate --support photos --out nets.safetensors")(generate)


@data_app.command("list", epilog="Example: FLOWN_DATA=data flown data list")
def data_list() -> None:
    """Every data set that has a name, and where it comes from."""
    from flown import tasks as data

    body = [
        [source.name, source.origin, "yes" if source.present else "no", source.note]
        for source in data.available()
    ]
    print_table(console, "", (["name", "from", "here", "note"], body), prose=True)


@data_app.command("show", epilog="Example: flown data show digits")
def data_show(
    name: Annotated[str, typer.Argument(help="A data set's name or a folder of images.")],
) -> None:
    """Shapes, split sizes and class names of a data set, by name or folder."""
    from flown import tasks as data

    for key, value in data.summary(name).items():
        say(console, f"{key}: {value}")


app.command(epilog="Example: flown evaluate nets.safetensors --data mnist5k --zoo zoo")(evaluate)


app.command(epilog="Example: flown export nets.safetensors --to onnx --out nets.onnx")(export)


class Bench(str, Enum):
    """What can be timed."""

    zoo = "zoo"
    store = "store"
    sample = "sample"
    encoding = "encode"  # `encode` is a method of str
    evaluate = "evaluate"
    adapt = "adapt"
    heads = "heads"
    anytask = "anytask"


@app.command(epilog="Example: flown bench evaluate --out bench.json")
def bench(
    what: Annotated[Bench, typer.Argument(help="What is timed.")],
    out: Annotated[Optional[Path], typer.Option("--out", help="A JSON file for the rows.")] = None,
    model: Annotated[
        Optional[str],
        typer.Option(
            help="A shipped model, for `sample`, `adapt` and `anytask`; flown-any for the last, "
            "else flown-small."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Timings of each candidate.")] = 5,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; for `zoo` and `sample`.")] = "cpu",
) -> None:
    """Time candidates side by side in one run; medians of several repeats."""
    import tempfile
    import time

    from flown import bench as benches
    from flown.base.output import OutputFile

    file = None if out is None else OutputFile(out, overwrite)
    model = model or ("flown-any" if what is Bench.anytask else "flown-small")
    device = device_of(device) if what in (Bench.zoo, Bench.sample) else "cpu"
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if what is Bench.zoo:
            rows = benches.zoo(repeats, device)
        elif what is Bench.store:
            rows = benches.store(repeats, Path(scratch))
        elif what is Bench.sample:
            rows = benches.sample(model, repeats, device)
        elif what is Bench.encoding:
            rows = benches.encode(repeats)
        elif what is Bench.adapt:
            rows = benches.adapt(model, repeats, Path(scratch))
        elif what is Bench.anytask:
            rows = benches.anytask(model, repeats)
        elif what is Bench.heads:
            rows = benches.heads(repeats, Path(scratch))
        else:
            rows = benches.evaluate(repeats)
    benches.show(rows, console, device)
    if file is not None:
        counts = {
            Bench.zoo: 64,
            Bench.store: 100_000,
            Bench.encoding: 32,
            Bench.adapt: 8,
            Bench.heads: 50_000,
        }
        shipped = what in (Bench.sample, Bench.adapt, Bench.anytask)
        config = benches.BenchConfig(
            what=what.value,
            repeats=repeats,
            model=model if shipped else None,
            networks=counts.get(what, 100),
            device=device,
        )
        benches.write(file.path, config, time.monotonic() - start, rows)
        wrote(file.path)


for command, example in (
    (finetune, "finetune nets.safetensors --data digits --out tuned.safetensors"),
    (adapt, "adapt flown-small --data usps --out run"),
    (fewshot, "fewshot photos --label new --out labelled"),
    (play, "play --no-browser --port 8000"),
    (reproduce, "reproduce table2 --scale smoke --out table2"),
):
    app.command(epilog=f"Example: flown {example}")(command)
app.add_typer(data_app, name="data")
app.add_typer(zoo_app, name="zoo")


def main() -> None:
    """Entry point: 0 success, 2 a mendable error, 1 failure, 130 interrupted."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    warnings.showwarning = _warn
    try:
        code = app(arguments, standalone_mode=False)
        if code == 130:  # typer's way of saying Ctrl-C
            raise KeyboardInterrupt
    except FlownError as error:
        _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; add --resume to go on from the last checkpoint", 130, debug)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": "), 2, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 2, debug)
    except MemoryError:
        _fail(_NO_MEMORY, 2, debug)
    except Exception as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):  # torch's words
            _fail(_NO_MEMORY, 2, debug)
        if hasattr(error, "format_message"):  # click's usage errors
            _fail(error.format_message(), 2, debug)
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1, debug)
    sys.exit(code or 0)


_NO_MEMORY = "more memory is needed than there is; ask for fewer or smaller networks or images"
_LINES = "\n\t"  # a message may have lines


_show = warnings.showwarning


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning that is meant for users as a line; others look as Python's do."""
    if issubclass(category, FlownWarning):
        print(f"warning: {plain(str(message))}", file=sys.stderr)
    else:
        _show(message, category, filename, lineno, file, line)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        print(plain(traceback.format_exc(), keep=_LINES), file=sys.stderr, end="")
    print(f"flown: {plain(message, keep=_LINES)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
