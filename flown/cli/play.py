"""The command that opens the page on which networks are generated for drawings."""

from __future__ import annotations

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.errors import FlownError
from flown.base.terminal import say
from flown.cli.options import Overwrite, console, wrote


def play(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An any-task generator: shipped, folder or hub.")
    ] = "flown-any",
    out: Annotated[
        Optional[Path],
        typer.Option("--out", help="Write the page there, to be put anywhere, and serve nothing."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine; 0 is any that is free.")
    ] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    runtime: Annotated[
        Optional[Path],
        typer.Option(
            help="The archive of onnxruntime-web, for a machine without internet; otherwise it is "
            "fetched once, 33 MB."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw a few of each, and watch a network for them appear out of noise, in a browser."""
    from flown.base.output import OutputFolder
    from flown.generator.files import locate
    from flown.play.runtime import runtime as runtime_of
    from flown.play.site import check_model, server, write_site

    folder = locate(model)
    if out is not None:
        site = OutputFolder(out, overwrite, sources=[folder])
        check_model(folder)
        found = runtime_of(runtime)
        site.begin()
        write_site(folder, found, site.path)
        wrote(out / "index.html")
        say(console, "put the folder behind any web server; a browser opens no scripts from files")
        return
    with tempfile.TemporaryDirectory(prefix="flown-play-") as scratch:
        write_site(folder, runtime_of(runtime), Path(scratch))
        try:
            serving = server(Path(scratch), port)
        except OSError as error:
            raise FlownError(f"--port {port}: {error.strerror}; choose another, or 0") from None
        address = f"http://127.0.0.1:{serving.server_port}/"
        say(console, f"{address} (Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            serving.server_close()
