"""CAML: in-context image classification by a transformer (Fifty et al. 2310.10971).

Token = image feature ++ label embedding. A sequence is one query and the whole support set; the
query carries a learned "unknown" label, the support the ELMES of its labels. There is no positional
encoding, so the support's order means nothing. The output at the query is read after the last
LayerNorm. The number of ways is a constructor argument; fewer ways use the first of the frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.config import Config
from flown.context.elmes import elmes
from flown.errors import FlownError


class CAMLConfig(Config):
    """Sizes; the defaults are trained here, `published()` is CLIP ViT-B/16's CAML."""

    ways: int = 20
    feature_dim: int = 128
    label_dim: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 384

    @property
    def width(self) -> int:
        return self.feature_dim + self.label_dim

    @classmethod
    def published(cls) -> CAMLConfig:
        return cls(ways=5, feature_dim=768, label_dim=256, layers=24, heads=16, mlp=4096)


class CAML(nn.Module):
    """Query outputs (B, Q, width) from support features, labels and query features."""

    label_elmes: Tensor

    def __init__(self, config: CAMLConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.register_buffer("label_elmes", elmes(config.ways, config.label_dim))
        self.elmes_scale = nn.Parameter(torch.ones(1))
        self.unk_emb = nn.Parameter(torch.zeros(1, 1, config.label_dim))
        self.transformer_encoder = _Encoder(width, config.layers, config.heads, config.mlp)
        self.output_proj = nn.Linear(width, config.ways)
        with torch.no_grad():  # reads the label part at first: copying a label is the task's core
            self.output_proj.weight[:, config.feature_dim :] = self.label_elmes

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Outputs at the queries.

        Args:
            support: features (B, S, F); `labels` (B, S) in 0..ways-1.
            query: features (B, Q, F); each in a sequence of its own with the support.
        """
        if int(labels.max()) >= self.config.ways:
            raise FlownError(f"caml: label {int(labels.max())}, built for {self.config.ways} ways")
        embedded = self.elmes_scale * self.label_elmes[labels]  # (B, S, label)
        known = torch.cat([support, embedded], dim=2)
        unknown = self.unk_emb.expand(*query.shape[:2], -1)
        asked = torch.cat([query, unknown], dim=2)  # (B, Q, width)
        batch, queries = query.shape[:2]
        repeated = known[:, None].expand(-1, queries, -1, -1)
        sequence = torch.cat([asked[:, :, None], repeated], dim=2).flatten(0, 1)  # (BQ, 1+S, width)
        output: Tensor = self.transformer_encoder(sequence)
        return output.unflatten(0, (batch, queries))

    def logits(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Class scores (B, Q, ways)."""
        return self.output_proj(self(support, labels, query))  # type: ignore[no-any-return]


class _Encoder(nn.Module):
    """Pre-norm transformer layers and a last LayerNorm; returns the first token's output."""

    def __init__(self, width: int, layers: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"encoder_layer_{i}": _Layer(width, heads, mlp) for i in range(layers)}
        )
        self.ln = nn.LayerNorm(width)

    def forward(self, sequence: Tensor) -> Tensor:
        for layer in self.layers.values():
            sequence = layer(sequence)
        return self.ln(sequence[:, 0])  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"linear_1": nn.Linear(width, mlp), "linear_2": nn.Linear(mlp, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.self_attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp["linear_2"](F.gelu(self.mlp["linear_1"](self.ln_2(x))))  # type: ignore[no-any-return]


def load_published(state: Mapping[str, Tensor], config: CAMLConfig | None = None) -> CAML:
    """A CAML from the published checkpoint's state dict.

    Its names are `transformer_encoder.*`, `label_elmes`, `unk_emb` and, where stored, `elmes_scale`
    and `output_proj.*`; layers follow torchvision's vision transformer in either of its spellings
    (`mlp.linear_1` or `mlp.0`), with or without `encoder.` in front. The image backbone is not
    part of it.

    Raises:
        FlownError: a tensor is missing, superfluous or of another shape; the message names it.
    """
    model = CAML(config or CAMLConfig.published())
    own = model.state_dict()
    found = {}
    for name, tensor in state.items():
        if name.startswith("feature_extractor."):
            continue
        short = name.removeprefix("module.")
        short = short.replace("transformer_encoder.encoder.", "transformer_encoder.")
        short = re.sub(r"mlp\.0\.", "mlp.linear_1.", short)
        short = re.sub(r"mlp\.3\.", "mlp.linear_2.", short)
        if short not in own:
            raise FlownError(f"caml checkpoint: unexpected tensor '{name}'")
        if short == "elmes_scale":
            tensor = tensor.reshape(1)
        if tensor.shape != own[short].shape:
            got, want = tuple(tensor.shape), tuple(own[short].shape)
            raise FlownError(f"caml checkpoint: '{name}' is {got}, expected {want}")
        found[short] = tensor
    optional = {"elmes_scale", "output_proj.weight", "output_proj.bias"}
    if missing := sorted(set(own) - set(found) - optional):
        raise FlownError(f"caml checkpoint: tensor '{missing[0]}' is missing")
    model.load_state_dict({**own, **found})
    return model.eval()
