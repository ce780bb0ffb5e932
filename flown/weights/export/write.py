"""One way in to all formats: the file, and the card beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from flown.base.errors import FlownError, unknown
from flown.base.files import replacing, save_tensors, write_text
from flown.weights.batch import WeightBatch
from flown.weights.export import card
from flown.weights.export.c import identifier, write_c
from flown.weights.export.onnx import write_onnx


def export(batch: WeightBatch, path: Path | str, to: str, int8: bool = False) -> Path:
    """Writes networks to a file in a format of `FORMATS`, and a card beside it.

    Args:
        int8: weights as integers; for C alone.

    Returns:
        The path of the card, which says what was written and how it is used.

    Raises:
        FlownError: an unknown format, several networks where the format holds one, or what cannot be
            said in the format.
    """
    path = Path(path)
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    if int8 and to != "c":
        raise FlownError(f"--int8: is for --to c, not for {to}")
    use = _c(batch, path, int8) if to == "c" else FORMATS[to](batch, path)
    described = path.with_name(f"{path.name}.md")
    write_text(described, card.render(batch, use))
    return described


def _onnx(batch: WeightBatch, path: Path) -> str:
    write_onnx(batch, path)
    kind = batch.layout.architecture
    return (
        "The graph resizes and scales images itself: `images` is uint8 "
        f"(N, {kind.channels}, H, W) of any size, `probabilities` the mean of all networks, "
        f"(N, {kind.outputs}).\n\n```python\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{path.name}")\n'
        '(probabilities,) = session.run(None, {"images": images})\n```'
    )


def _c(batch: WeightBatch, path: Path, int8: bool = False) -> str:
    size = write_c(batch, path, int8)
    return (
        f"`int {identifier(path.stem)}_classify(const unsigned char *pixels, float *probabilities);` "
        f"takes {size.constants:,} bytes of constants and {size.memory:,} bytes of working memory. "
        f"`cc -std=c99 -O2 -c {path.name}` compiles it, `-lm` links what it needs."
    )


def _safetensors(batch: WeightBatch, path: Path) -> str:
    save_tensors(path, _alone(batch, "safetensors").state_dict(0))
    return "The weights of one network by their names in its state dict."


def _state_dict(batch: WeightBatch, path: Path) -> str:
    state = {k: v.cpu() for k, v in _alone(batch, "state_dict").state_dict(0).items()}
    with replacing(path) as scratch:
        torch.save(state, scratch)
    return f'`torch.load("{path.name}", weights_only=True)` gives the state dict of one network.'


def _alone(batch: WeightBatch, to: str) -> WeightBatch:
    if len(batch) != 1:
        raise FlownError(f"--to {to}: holds one network, {len(batch)} were given; choose one")
    return batch


FORMATS: dict[str, Callable[[WeightBatch, Path], str]] = {
    "onnx": _onnx,
    "c": _c,
    "safetensors": _safetensors,
    "state_dict": _state_dict,
}
