"""CAML: in-context image classification by a transformer (Fifty et al. 2310.10971).

    token = image feature (F,) ++ label embedding (L,),   width = F + L
    sequence = [query ++ u, support_1 ++ s e(y_1), ..., support_S ++ s e(y_S)]

The query carries a learned label u for "unknown", the support the ELMES vectors e of its labels times
a learned scale s. There is no positional encoding, so that the order of the support has no effect.
Layers are pre-norm (x + attention(LN x), then x + MLP(LN x)); the output is the query's token after a
last LayerNorm. Each query has its own sequence, since the support attends to it.
The number of ways is a constructor argument; fewer ways use as many vectors of the frame.

CAML compares and copies before any training: attention starts as a similarity (query = key weights,
output = transposed value weights, as in Trockman & Kolter 2305.09828), label vectors have the
scale of standardised features, and the classifier reads the label part. From the usual initialisation
the loss stays at chance for hundreds of steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config, Size
from flown.base.errors import FlownError
from flown.context.elmes import elmes

_EPS = 1e-6  # of the published LayerNorms


class CAMLConfig(Config):
    """Sizes; the defaults are those of the CAML that ships, `published()` those of the official one."""

    ways: Size = 20
    feature_dim: Size = 128
    label_dim: Size = 64
    layers: Size = 3
    heads: Size = 4
    mlp: Size = 384

    @property
    def width(self) -> int:
        """Of a token: feature and label embedding."""
        return self.feature_dim + self.label_dim

    @classmethod
    def published(cls) -> CAMLConfig:
        """The sizes of the official checkpoint, for features of CLIP ViT-B/16."""
        return cls(ways=5, feature_dim=768, label_dim=256, layers=24, heads=16, mlp=4096)


class CAML(nn.Module):
    """Query outputs (B, Q, width) from support features, labels and query features.

    Raises:
        FlownError: the heads do not divide the width, or no such frame of label vectors.
    """

    label_elmes: Tensor

    def __init__(self, config: CAMLConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise FlownError(f"caml: width {config.width} is no multiple of {config.heads} heads")
        self.config = config
        width = config.width
        self.register_buffer("label_elmes", elmes(config.ways, config.label_dim))
        self.elmes_scale = nn.Parameter(torch.full((1,), config.label_dim**0.5))
        self.unk_emb = nn.Parameter(torch.zeros(1, 1, config.label_dim))
        self.transformer_encoder = _Encoder(width, config.layers, config.heads, config.mlp)
        self.output_proj = nn.Linear(width, config.ways, bias=False)
        with torch.no_grad():
            self.output_proj.weight[:, config.feature_dim :] = self.label_elmes

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Outputs at the queries, (B, Q, width).

        Args:
            support: features (B, S, F); `labels` (B, S) in 0..ways-1.
            query: features (B, Q, F); each has its own sequence with the support.

        Raises:
            FlownError: features of another length, or a label out of range.
        """
        self._check(support, labels, query)
        batch, queries = query.shape[:2]
        known = torch.cat([support, self.elmes_scale * self.label_elmes[labels]], dim=2)
        asked = torch.cat([query, self.unk_emb.expand(batch, queries, -1)], dim=2)
        repeated = known[:, None].expand(-1, queries, -1, -1)  # (B, Q, S, width)
        sequence = torch.cat([asked[:, :, None], repeated], dim=2)  # (B, Q, 1 + S, width)
        output: Tensor = self.transformer_encoder(sequence.flatten(0, 1))  # (B Q, width)
        return output.reshape(batch, queries, -1)

    def logits(
        self, support: Tensor, labels: Tensor, query: Tensor, ways: int | None = None
    ) -> Tensor:
        """Class scores (B, Q, ways) of the first `ways` labels, by default of all."""
        scores: Tensor = self.output_proj(self(support, labels, query))
        return scores[..., :ways]

    def _check(self, support: Tensor, labels: Tensor, query: Tensor) -> None:
        for name, features in (("support", support), ("query", query)):
            if features.ndim != 3 or features.shape[2] != self.config.feature_dim:
                raise FlownError(
                    f"caml: expected {name} features (B, *, {self.config.feature_dim}), "
                    f"got {tuple(features.shape)}; was it trained on another backbone?"
                )
        if labels.shape != support.shape[:2]:
            want, got = tuple(support.shape[:2]), tuple(labels.shape)
            raise FlownError(f"caml: expected labels {want}, got {got}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.config.ways:
            raise FlownError(
                f"caml: labels go from {low} to {high}, it was built for {self.config.ways} ways; "
                "train one with more ways (CAMLConfig.ways)"
            )


class _Encoder(nn.Module):
    """Transformer layers and a last LayerNorm; (N, T, width) to the first token's (N, width)."""

    def __init__(self, width: int, layers: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"encoder_layer_{i}": _Layer(width, heads, mlp) for i in range(layers)}
        )
        self.ln = nn.LayerNorm(width, eps=_EPS)

    def forward(self, sequence: Tensor) -> Tensor:
        *layers, last = self.layers.values()
        for layer in layers:
            sequence = layer(sequence)
        # The last layer's outputs at the support are not needed.
        return self.ln(last(sequence, tokens=1)[:, 0])  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=_EPS), nn.LayerNorm(width, eps=_EPS)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"linear_1": nn.Linear(width, mlp), "linear_2": nn.Linear(mlp, width)}
        )
        with torch.no_grad():
            query, key, value = self.self_attention.in_proj_weight.chunk(3)
            key.copy_(query)
            self.self_attention.out_proj.weight.copy_(value.T)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """(N, T, width) to the first `tokens` outputs, by default all."""
        normed = self.ln_1(x)
        attended = self.self_attention(normed[:, :tokens], normed, normed, need_weights=False)[0]
        x = x[:, :tokens] + attended
        inner: Tensor = F.gelu(self.mlp["linear_1"](self.ln_2(x)))
        return x + self.mlp["linear_2"](inner)  # type: ignore[no-any-return]
