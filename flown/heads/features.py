"""Backbones by name, and their features of a data set, computed once and mapped into memory.

    image --backbone--> f (F,),   (f - mean) / std over the images of the base classes

A backbone is any `nn.Module` from uint8 images (N, 1 or 3, H, W) to features (N, F). A cache file is
keyed by a fingerprint of the backbone (weights and structure) and one of the images.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.errors import FlownError, unknown
from flown.base.files import halved, load_into, load_tensors, save_tensors
from flown.base.trust import is_code, load_code
from flown.context.backbones import Backbone, BackboneConfig, features
from flown.tasks import cache_folder
from flown.zoo.rows import checksum

SHIPPED = ("resnet12-small",)


class Standardised(nn.Module):
    """A backbone whose features have mean 0 and deviation 1 over the images of its base classes."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.zeros(backbone.config.features))
        self.register_buffer("std", torch.ones(backbone.config.features))
        self.eval().requires_grad_(False)

    def fit(self, images: Tensor) -> Standardised:
        """Takes mean and deviation from uint8 images (N, c, H, W)."""
        found = features(self.backbone, images)
        self.mean.copy_(found.mean(dim=0))
        self.std.copy_(found.std(dim=0).clamp_min(1e-3))  # a dead unit would divide by 0
        return self

    def forward(self, images: Tensor) -> Tensor:
        return (self.backbone(images) - self.mean) / self.std  # type: ignore[no-any-return]

    def save(self, path: Path | str, about: dict[str, Any] | None = None) -> None:
        """One safetensors file in half precision, its config and `about` in the header."""
        header = {
            "backbone": self.backbone.config.model_dump_json(),
            "about": json.dumps(about or {}),
        }
        save_tensors(path, halved(self.state_dict()), header)

    @classmethod
    def load(cls, path: Path | str) -> Standardised:
        """Reads what `save` wrote.

        Raises:
            FlownError: no such file, or not one of ours.
        """
        tensors, about = load_tensors(path)
        if "backbone" not in about:
            raise FlownError(f"{path}: no backbone of flown's, its header has no 'backbone'")
        config = BackboneConfig.parse(json.loads(about["backbone"]), str(path))
        made = cls(Backbone(config))
        load_into(made, tensors, path)
        return made


class _Timm(nn.Module):
    """A pretrained model of timm, images resized and normalised as it wants them."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise FlownError(
                "backbone: the package 'timm' is missing; pip install 'flown[timm]'"
            ) from None
        if name not in timm.list_models() and name not in timm.list_pretrained():
            raise unknown("timm model", name, timm.list_models())
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub's, the network's and timm's own: it is not to be had
            raise FlownError(f"backbone timm/{name}: its weights cannot be had ({error})") from None
        timm_data: Any = timm.data  # which mypy knows where timm is installed, and then in part
        wants = timm_data.resolve_model_data_config(self.model)
        self.side = tuple(wants["input_size"][1:])
        self.register_buffer("mean", torch.tensor(wants["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(wants["std"]).view(-1, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() / 255).expand(-1, 3, -1, -1)
        x = F.interpolate(x, self.side, mode="bilinear", antialias=True, align_corners=False)
        return self.model((x - self.mean) / self.std)  # type: ignore[no-any-return]


def load_backbone(name: str | Path) -> nn.Module:
    """A frozen backbone.

    Args:
        name: a shipped one of `SHIPPED`, a file that `Standardised.save` wrote, `timm/NAME`, or
            `package.module:function`: whatever can be imported and called, without arguments, for
            a module from uint8 images (N, c, H, W) to features (N, F); allow it by `flown.trust`.

    Raises:
        FlownError: no such backbone, code that is not allowed, or what the function returns is no module.
    """
    text = str(name)
    if text in SHIPPED:
        file = resources.files("flown.heads") / "pretrained" / f"{text}.safetensors"
        with resources.as_file(file) as path:
            return Standardised.load(path)
    if text.startswith("timm/"):
        return _Timm(text.removeprefix("timm/"))
    if text.endswith(".safetensors"):
        return Standardised.load(text)
    if not is_code(text):
        raise unknown(
            "backbone", text, (*SHIPPED, "timm/NAME", "FILE.safetensors", "module:function")
        )
    made = load_code(text, "backbone")()
    if not isinstance(made, nn.Module):
        raise FlownError(f"backbone '{text}': returned {type(made).__name__}, expected nn.Module")
    return made.eval().requires_grad_(False)


def fingerprint(backbone: nn.Module) -> str:
    """The same for the same structure and weights."""
    found = hashlib.sha256(repr(backbone).encode())
    for name, tensor in backbone.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def cached_features(backbone: nn.Module, images: Tensor, folder: Path | None = None) -> Tensor:
    """Features (N, F) of uint8 images (N, c, H, W): from the cache, or computed and put there.

    Args:
        folder: of the cache files; by default `features` in the library's cache folder.

    Raises:
        FlownError: the cache file is damaged, or is of another backbone or other images.
    """
    key = {
        "backbone": fingerprint(backbone),
        "images": hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:16],
    }
    folder = folder or cache_folder() / "features"
    path = folder / f"{key['backbone']}-{key['images']}.safetensors"
    if not path.exists():
        found = features(backbone, images).contiguous()
        if found.ndim != 2 or len(found) != len(images):
            want, got = f"({len(images)}, F)", tuple(found.shape)
            raise FlownError(f"backbone: expected features {want}, got {got}")
        save_tensors(path, {"features": found}, {**key, "checksum": str(checksum(found))})
    tensors, about = load_tensors(path)
    for what, value in key.items():
        if about.get(what) != value:
            raise FlownError(f"{path}: features of other {what} than asked for; remove the file")
    if checksum(tensors["features"]) != int(about["checksum"]):
        raise FlownError(f"{path}: not what was written, the file is damaged; remove it")
    return tensors["features"]
