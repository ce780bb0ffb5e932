"""Backbones by name, and their features of a data set, computed once and kept in a cache.

    image --backbone--> f (F,),   (f - mean) / std over the images of the base classes

A backbone is any `nn.Module` from uint8 images (N, 1 or 3, H, W) to features (N, F). A cache file is
keyed by a fingerprint of the backbone (weights and structure) and one of the images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.errors import FlownError, unknown
from flown.base.files import load_tensors, save_tensors
from flown.base.frozen import load_frozen, load_shipped, save_frozen
from flown.base.progress import bar
from flown.base.trust import is_code, load_code
from flown.context.backbones import Backbone, BackboneConfig, features
from flown.tasks import cache_folder
from flown.zoo.rows import checksum

SHIPPED = ("resnet12-small",)
_TOGETHER = 2048  # images between two marks of the progress bar


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
        """Sets mean and deviation to those of the features of uint8 images (N, c, H, W)."""
        found = features(self.backbone, images)
        self.mean.copy_(found.mean(dim=0))
        self.std.copy_(found.std(dim=0).clamp_min(1e-3))  # a dead unit would divide by 0
        return self

    def forward(self, images: Tensor) -> Tensor:
        return (self.backbone(images) - self.mean) / self.std  # type: ignore[no-any-return]

    def save(self, path: Path | str, about: dict[str, Any] | None = None) -> None:
        """One safetensors file in half precision, its config and `about` in the header."""
        header = {"about": json.dumps(about or {})}
        save_frozen(self, path, "backbone", self.backbone.config, header)

    @classmethod
    def load(cls, path: Path | str) -> Standardised:
        """Reads what `save` wrote.

        Raises:
            FlownError: no such file, or no backbone that flown wrote.
        """
        return load_frozen(
            path,
            "backbone",
            "backbone that flown wrote",
            BackboneConfig,
            lambda config, _: cls(Backbone(config)),
        )


class _Timm(nn.Module):
    """A pretrained model of timm; images are resized and normalised as its configuration says."""

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
        except Exception as error:  # the hub, the network and timm raise errors of many types
            raise FlownError(
                f"backbone timm/{name}: its weights are neither in the cache nor downloadable "
                f"({error}); connect to the network once, or take another backbone"
            ) from None
        timm_data: Any = timm.data  # its types are known only where timm is installed
        input_config = timm_data.resolve_model_data_config(self.model)
        self.side = tuple(input_config["input_size"][1:])
        for key in ("mean", "std"):
            tensor = torch.tensor(input_config[key]).view(-1, 1, 1)
            self.register_buffer(key, tensor, persistent=False)
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
        return load_shipped("flown.heads", text, Standardised.load)
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
    """A text that is equal for two backbones of equal structure and weights."""
    found = hashlib.sha256(repr(backbone).encode())
    for name, tensor in backbone.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def cached_features(backbone: nn.Module, images: Tensor, folder: Path | None = None) -> Tensor:
    """Features (N, F) of uint8 images (N, c, H, W): from the cache, or computed and written to it.

    Args:
        folder: of the cache files; by default `features` in the library's cache folder.

    Raises:
        FlownError: the cache file is damaged, or belongs to another backbone or other images.
    """
    key = {
        "backbone": fingerprint(backbone),
        "images": hashlib.sha256(images.contiguous().numpy().data).hexdigest()[:16],
    }
    folder = folder or cache_folder() / "features"
    path = folder / f"{key['backbone']}-{key['images']}.safetensors"
    if not path.exists():
        parts = []
        with bar("features", len(images)) as update:
            for part in images.split(_TOGETHER):
                parts.append(features(backbone, part))
                update(sum(map(len, parts)), "")
        found = torch.cat(parts).contiguous()
        if found.ndim != 2 or len(found) != len(images):
            want, got = f"({len(images)}, F)", tuple(found.shape)
            raise FlownError(f"backbone: expected features {want}, got {got}")
        save_tensors(path, {"features": found}, {**key, "checksum": str(checksum(found))})
    tensors, about = load_tensors(path)
    for what, value in key.items():
        if about.get(what) != value:
            raise FlownError(f"{path}: features of other {what} than requested; remove the file")
    if checksum(tensors["features"]) != int(about["checksum"]):
        raise FlownError(f"{path}: the checksum differs, the file is damaged; remove it")
    return tensors["features"]
