"""The space that a flow moves in: networks of several layouts as latents, and back.

weights (D_a,) --pad--> (D,) --scale--> (D + 2 T,) --encoder--> latents (4, 4, 4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flown import flow
from flown.base.errors import FlownError, unknown
from flown.encoders import Encoder
from flown.generator.config import FlownConfig
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, WeightLayout
from flown.weights.scale import NetworkScale


class LatentSpace(nn.Module):
    """Encodes and decodes networks of the layouts of `joint`.

    Args:
        frozen: the tensors that the networks of each layout share, by state_dict name, where only a
            subset is generated.
    """

    def __init__(
        self,
        joint: JointLayout,
        scale: NetworkScale,
        encoder: Encoder,
        frozen: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        super().__init__()
        self.joint, self.scale, self.encoder = joint, scale, encoder
        self.frozen = [dict(x) for x in frozen] or [{} for _ in joint.layouts]
        self.shape = encoder.latent_shape

    @property
    def device(self) -> torch.device:
        return self.scale.mean.device

    def place(self, layout: WeightLayout) -> int:
        """The place of a layout in the space.

        Raises:
            FlownError: the space does not have it.
        """
        if layout in self.joint.layouts:
            return self.joint.layouts.index(layout)
        self.joint.layouts[0].check_same_weights(layout, "model")
        raise FlownError(
            f"model: fitted on no networks of architecture {layout.architecture}: the same weights "
            "behind another activation or normalisation are another classifier"
        )

    def encode_joint(self, vectors: Tensor, layouts: Tensor) -> Tensor:
        """Vectors (n, D) of the joint space, of layouts (n,), to latents (n, *shape)."""
        return self.encoder.encode(self.scale(vectors, layouts))

    def encode(self, batch: WeightBatch) -> Tensor:
        """Encodes networks as latents (n, *shape)."""
        index = self.place(batch.layout)
        vectors = self.joint.embed(batch.vectors.to(self.device), index)
        return self.encode_joint(vectors, torch.full((len(batch),), index, device=self.device))

    def decode(self, latents: Tensor, layout: int) -> WeightBatch:
        """Latents (n, *shape) to networks of a layout, whose BatchNorm is to be `calibrated`.

        Differentiable.

        Raises:
            FlownError: the decoded weights hold NaN or Inf.
        """
        scaled = self.encoder.decode(latents)
        index = torch.full((len(latents),), layout, device=latents.device)
        vectors = self.joint.extract(self.scale.invert(scaled, index), layout)
        chosen = self.joint.layouts[layout]
        if not torch.isfinite(vectors).all():
            raise FlownError(f"decoding gave NaN or Inf weights of {chosen.net}")
        return WeightBatch(chosen, vectors, frozen=self.frozen[layout])

    def source(self, config: FlownConfig, prior: Mapping[str, Tensor]) -> flow.Source:
        """The flow's source distribution p0.

        Raises:
            FlownError: unknown source, or a prior that does not fit.
        """
        name = config.flow.source
        if name not in flow.SOURCES:
            raise unknown("source", name, flow.SOURCES)
        if name == "gaussian":
            return flow.Gaussian(self.shape, self.device)
        shapes = [list(zip(x.names, x.shapes, strict=True)) for x in self.joint.layouts]

        def pack(tensors: dict[str, Tensor], layout: int) -> Tensor:
            return self.joint.embed(self.joint.layouts[layout].pack(tensors), layout)

        encode = torch.no_grad()(self.encode_joint)
        if name == "checkpoint":
            return flow.Checkpoint(prior, shapes, pack, encode)
        made: flow.Source = flow.SOURCES[name](shapes, pack, encode)
        return made
