"""Networks as one ONNX graph from pixels to probabilities, for onnxruntime and whatever else reads ONNX.

p(images) = 1 / n  sum_i softmax(net_i(preprocess(images)))
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from flown.base.errors import FlownError
from flown.base.files import replacing
from flown.weights.batch import WeightBatch

OPSET = 18  # the first whose Resize removes what a small image cannot show


class Ensemble(nn.Module):
    """The mean prediction of all networks of a batch, with preprocessing."""

    def __init__(self, batch: WeightBatch) -> None:
        super().__init__()
        self.architecture = batch.layout.architecture
        self.networks = nn.ModuleList([batch.module(i) for i in range(len(batch))])

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (N, C) of images (N, channels, H, W), uint8."""
        x = self.architecture.preprocess(images)
        return torch.stack([net(x).softmax(dim=-1) for net in self.networks]).mean(dim=0)


def write_onnx(batch: WeightBatch, path: Path | str) -> None:
    """Writes all networks of a batch as one graph.

    Its input `images` are uint8 (N, channels, H, W) of any number and size, its output
    `probabilities` is (N, C). Class names and provenance are in the file's metadata.

    Raises:
        FlownError: no networks, what `WeightBatch.module` needs is missing, onnx is not installed, or
            the network computes something that ONNX cannot say.
    """
    if not len(batch):
        raise FlownError(f"{path}: no networks to export")
    try:
        import onnxscript  # noqa: F401  torch asks for it late, with a long message
    except ImportError:
        raise FlownError("ONNX needs onnx and onnxscript: pip install 'flown[export]'") from None
    ensemble = Ensemble(batch.to("cpu")).eval()
    architecture = batch.layout.architecture
    # Two sides that differ, so that neither is taken for a constant.
    example = torch.zeros(2, architecture.channels, 40, 36, dtype=torch.uint8)
    sizes = {0: Dim("N"), 2: Dim("H"), 3: Dim("W")}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                ensemble,
                (example,),
                dynamo=True,
                dynamic_shapes=(sizes,),
                opset_version=OPSET,
                input_names=["images"],
                output_names=["probabilities"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise FlownError(f"{batch.name}: cannot be written as ONNX ({reason})") from None
    assert program is not None
    program.model.metadata_props["provenance"] = json.dumps(batch.provenance)
    if batch.task:
        program.model.metadata_props["classes"] = json.dumps(batch.task.classes)
    with replacing(path) as scratch:
        program.save(scratch)
