"""A model's folder: three tensor files, a model card, and `config.json`, which is written last."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flown.base.config import check_plain
from flown.base.errors import FlownError, unknown
from flown.base.files import (
    check_finite,
    halved,
    load_tensors,
    read_json,
    read_object,
    save_tensors,
    write_json,
    write_text,
)
from flown.base.text import plain
from flown.tasks import TaskTable

FORMAT = "flown-model-2"
PARTS = ("encoder", "flow", "context")
SHIPPED = ("flown-small", "flown-any")

Tensors = Mapping[str, Tensor]


def write(
    folder: Path,
    parts: Mapping[str, Tensors],
    values: Mapping[str, Any],
    tasks: TaskTable,
    readme: str,
) -> None:
    """Writes all files; `config.json` last, so that its presence means a whole model.

    Raises:
        FlownError: a tensor holds NaN or Inf, or the folder cannot be written.
    """
    for part in PARTS:
        check_finite(parts[part], folder / f"{part}.safetensors")
    for part in PARTS:
        save_tensors(folder / f"{part}.safetensors", parts[part])
    tasks.write(folder / "tasks.jsonl")
    write_text(folder / "README.md", plain(readme, keep="\n\t"))
    write_json(folder / "config.json", {"format": FORMAT, **values})


def write_card(folder: Path, card: Mapping[str, Any], readme: str) -> None:
    """Replaces a saved model's report card; its tensors stay as they are."""
    write_text(folder / "README.md", plain(readme, keep="\n\t"))
    write_json(folder / "config.json", read_json(folder / "config.json") | {"card": card})


def read(folder: Path) -> tuple[dict[str, Any], TaskTable, dict[str, dict[str, Tensor]]]:
    """The values of `config.json`, the tasks of training, and the tensors of each part.

    Raises:
        FlownError: a file is missing or broken.
    """
    if not (folder / "config.json").is_file():
        raise FlownError(f"{folder}: not a whole model, config.json is missing")
    values = read_object(folder / "config.json")
    if values.get("format") == "flown-model-1":
        raise FlownError(
            f"{folder}: a model of flown 0.1, which tells tasks by their number; fit it again: "
            "flown zoo convert ZOO --out NEW, then flown fit --zoo NEW"
        )
    if values.get("format") != FORMAT:
        raise FlownError(f"{folder}/config.json: format {values.get('format')!r}, not {FORMAT!r}")
    for key, kind in {"config": dict, "layouts": list, "epochs": list, "card": dict}.items():
        if not isinstance(values.get(key, kind()), kind) or (key == "config" and key not in values):
            raise FlownError(f"{folder}/config.json: {key}: missing, or no {kind.__name__}")
    check_plain(values, f"{folder}/config.json")
    for name in ("tasks.jsonl", *(f"{part}.safetensors" for part in PARTS)):
        if not (folder / name).is_file():
            raise FlownError(f"{folder}: not a whole model, {name} is missing")
    tensors = {part: load_tensors(folder / f"{part}.safetensors")[0] for part in PARTS}
    return values, TaskTable.read(folder / "tasks.jsonl"), tensors


def prefixed(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The state of several modules, each under its name."""
    return {f"{name}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    start = prefix + "."
    return {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}


def floats(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """As `under`, in single precision."""
    return {k: v.float() for k, v in under(prefix, tensors).items()}


def frozen(tensors: Tensors, layouts: int) -> list[dict[str, Tensor]]:
    """The tensors that networks of each layout share, stored as `rest.<k>.<name>`; in float32."""
    return [
        {
            k: v.float() if v.is_floating_point() else v
            for k, v in under(f"rest.{i}", tensors).items()
        }
        for i in range(layouts)
    ]


def fill(module: nn.Module, name: str, tensors: Tensors, file: Path) -> None:
    """Loads the tensors that `prefixed` stored under `name`.

    Raises:
        FlownError: the tensors belong to another module, or hold NaN or Inf.
    """
    loaded = under(name, tensors)
    check_finite(loaded, file)
    try:
        module.load_state_dict(
            loaded, strict=True
        )  # half precision on disk becomes the module's own
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise FlownError(f"{file}: does not fit config.json ({reason})") from None


def export(source: Path, target: Path) -> None:
    """Copies a model's folder in half precision, which halves its size; it loads as any other.

    Raises:
        FlownError: `source` is not a complete model.
    """
    values, tasks, parts = read(source)
    small = {part: halved(tensors) for part, tensors in parts.items()}
    readme = (source / "README.md").read_text(encoding="utf-8")
    write(target, small, {k: v for k, v in values.items() if k != "format"}, tasks, readme)


def locate(name: str, **options: Any) -> Path:
    """The folder of a model, given as a folder, a shipped model's name, or a hub id.

    Args:
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        FlownError: there is no such model.
    """
    if name in SHIPPED:
        return shipped(name)
    if Path(name).exists():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FlownError(f"{name}: no such model folder. {unknown('model', name, SHIPPED)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **options))
    except OSError as error:
        raise FlownError(f"{name}: no folder, and not to be had from the hub ({error})") from None


def shipped(name: str) -> Path:
    """The folder of a model that ships with the package."""
    return Path(str(resources.files("flown") / "pretrained" / name))


def shipped_zoo(name: str) -> Path:
    """The zoo that a shipped model was fitted on; it ships too.

    Raises:
        FlownError: no such shipped model.
    """
    found = shipped(f"{name}-zoo")
    if name not in SHIPPED or not found.exists():
        raise unknown("model that ships with its zoo", name, SHIPPED[:1])
    return found
