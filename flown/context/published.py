"""The official CAML checkpoint's names, mapped to ours.

The published state dict (github.com/mfifty/CAML) holds the image backbone under
`feature_extractor.` and the rest under `transformer_encoder.`, all of it under `module.` where it was
trained on several GPUs: the layers as torchvision's vision
transformer names them (`encoder.layers.encoder_layer_0.mlp.0`, in older versions `mlp.linear_1`),
the label frame `label_elmes`, its scale and the query's embedding. The earliest files call the
frame `label_etf`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flown.base.errors import FlownError
from flown.context.caml import CAML, CAMLConfig

_HEAD = "transformer_encoder."
_OLD = {"label_elmes": "label_etf", "elmes_scale": "etf_scale"}
_MLP = {"mlp.linear_1": "mlp.0", "mlp.linear_2": "mlp.3"}


def published_name(name: str) -> str:
    """The official name of one of `CAML`'s tensors."""
    if not name.startswith(_HEAD):
        return _HEAD + name
    for ours, theirs in _MLP.items():
        name = name.replace(ours, theirs)
    return name.replace(_HEAD, f"{_HEAD}encoder.", 1)


def _spellings(name: str) -> set[str]:
    """All names of one tensor in versions of the official code."""
    current = published_name(name)
    names = {current}
    for ours, theirs in _MLP.items():
        names.add(current.replace(theirs, ours))
    for now, before in _OLD.items():
        names.add(current.replace(now, before))
    return names


def load_published(state: Mapping[str, Tensor], config: CAMLConfig | None = None) -> CAML:
    """A frozen CAML with the weights of an official state dict.

    Args:
        state: the tensors by name; read the file yourself (`torch.load(..., weights_only=True)`).
            Those of the image backbone are ignored: it is a separate model.
        config: the checkpoint's sizes, by default those of the CLIP ViT-B/16 one.

    Raises:
        FlownError: a tensor is missing, superfluous or of another shape; the message names it.
    """
    model = CAML(config or CAMLConfig.published())
    expected = model.state_dict()
    ours = {spelling: name for name in expected for spelling in _spellings(name)}
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        own = key.removeprefix("module.")
        if own.startswith("feature_extractor."):
            continue
        name = ours.get(own)
        if name is None:
            raise FlownError(f"caml checkpoint: unexpected tensor '{key}'; is it another model?")
        if tensor.shape != expected[name].shape:
            got, want = tuple(tensor.shape), tuple(expected[name].shape)
            raise FlownError(
                f"caml checkpoint: tensor '{key}' is {got}, expected {want}; "
                "give the checkpoint's sizes as CAMLConfig"
            )
        found[name] = tensor.float()
    if missing := [name for name in expected if name not in found]:
        raise FlownError(f"caml checkpoint: tensor '{published_name(missing[0])}' is missing")
    model.load_state_dict(found)
    return model.requires_grad_(False).eval()
