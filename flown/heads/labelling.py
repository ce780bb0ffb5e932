"""Labelling a folder of images from a few labelled ones: features, a head, confidences.

    z = (f - c) / |f - c|,   p = softmax(head(z) / tau)

f are the backbone's features, c their mean over the images of its training, or over the support
where that is unknown. The head is one of `HEADS`; `calibrate` finds tau.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base import errors
from flown.base.errors import FlownError
from flown.base.files import write_json, write_text
from flown.context import CAML, SupportEncoder
from flown.context.backbones import Backbone
from flown.heads import calibrate, folder
from flown.heads.classifiers import apply_heads, cosine_heads, probe_heads, ridge_heads
from flown.heads.features import Standardised, load_backbone
from flown.heads.heads import feature_head
from flown.heads.incontext import caml_logits
from flown.heads.meta import flow_heads
from flown.heads.unknown import distances, left_out, limit
from flown.heads.written import GENERATOR, Written, are_strokes
from flown.nets.linear import NormalisedHead
from flown.tasks import Pictures, Support, read_pictures
from flown.tasks.task import Task
from flown.version import __version__
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout

BACKBONE, HEAD = "resnet12-small", "auto"
OUTPUTS = ("predictions.csv", "head.safetensors", "labels.json")
CONTEXT = "context"  # the backbone that the shipped CAML was trained on


class _Kind(NamedTuple):
    """Supports, labels and ways to heads, and tau_0 for 1 and for 5 images a class."""

    heads: Callable[[Tensor, Tensor, int], Tensor]
    taus: tuple[float, float]


# The best heads on tasks of validation classes, of 1 and of 5 images a class: of Omniglot's characters, and
# of mini-ImageNet's photographs; `flown.heads.validate` measures them.
STROKES, PICTURES = "written", "centroid"

# These settings are the best on 5-way tasks of mini-ImageNet's validation classes, of 1 and of 5
# images a class, with the shipped backbone; `flown.heads.validate` measures them.
LINEAR = {
    "centroid": _Kind(cosine_heads, (2.3, 1.5)),
    "ridge": _Kind(partial(ridge_heads, strength=10.0), (0.022, 0.036)),
    "probe": _Kind(probe_heads, (0.29, 0.19)),
    "flow": _Kind(flow_heads, (0.57, 0.21)),
}
HEADS = (*LINEAR, "caml", "written")
_TRAINED = {  # what was trained on which backbone
    "caml": ("CAML", CONTEXT),
    "flow": ("the generator", BACKBONE),
    "written": ("the generator", GENERATOR),
}
UNKNOWN = "unknown"  # the label of images of no class
_CAML_TAUS = (2.6, 2.3)


@dataclass(frozen=True)
class Labelled:
    """Classes learnt from one folder, and the labels of the images of another.

    `left_out` (n, C) are the probabilities of the support's images `rows` (n,) by heads that have not
    seen them; None where a class has a single image. `head` holds one network from features to logits,
    whose softmax are the confidences, or whole networks that vote; None for CAML, which has no head.
    `novelty` (N,) is beyond 1 for queries of no class, where that was asked.
    """

    method: str
    backbone: str
    classes: tuple[str, ...]
    support: Pictures
    rows: Tensor
    left_out: Tensor | None
    queries: folder.Queries | None
    probabilities: Tensor | None  # (N, C), of the queries
    novelty: Tensor | None
    head: WeightBatch | None
    temperature: float
    warnings: tuple[str, ...]
    seconds: float

    def save(self, out: Path | str) -> list[Path]:
        """Writes the table and the head; a file of `OUTPUTS` without content is removed.

        Returns:
            The paths of the written files.
        """
        table, network, record = (Path(out) / name for name in OUTPUTS)
        if self.queries is not None and self.probabilities is not None:
            write_text(table, _csv(self, self.queries, self.probabilities))
        else:
            table.unlink(missing_ok=True)
        if self.head is not None:
            self.head.save(network)
        else:
            network.unlink(missing_ok=True)
        write_json(record, self.record())
        return [path for path in (table, network, record) if path.exists()]

    def record(self) -> dict[str, Any]:
        """What was done, by which a folder is known to be no class of images."""
        return {
            "format": "flown-labels-1",
            "flown": __version__,
            "head": self.method,
            "backbone": self.backbone,
            "classes": list(self.classes),
            "images learnt from": len(self.support),
            "images labelled": 0 if self.queries is None else len(self.queries),
            "temperature": self.temperature,
            "figures": [
                {"images": name, "n": n, "accuracy": accuracy, "calibration error": error}
                for name, n, accuracy, error in self.figures()
            ],
            "warnings": list(self.warnings),
        }

    def is_unknown(self, i: int) -> bool:
        """Whether a query is of no class."""
        return self.novelty is not None and float(self.novelty[i]) > 1

    def figures(self) -> list[tuple[str, int, float, float]]:
        """Measurements: which images, how many, accuracy and calibration error in percent."""
        found = []
        if self.left_out is not None:
            found.append(("left out in turn", self.left_out, self.support.labels[self.rows]))
        if self.queries is not None and self.probabilities is not None:
            labels = self.queries.labels
            if len(known := (labels >= 0).nonzero().flatten()):
                found.append(("to label, class known", self.probabilities[known], labels[known]))
        return [
            (
                name,
                len(labels),
                100 * float((p.argmax(dim=1) == labels).float().mean()),
                calibrate.calibration_error(p, labels),
            )
            for name, p, labels in found
        ]


def label(
    support: Path | str,
    queries: Path | str | None = None,
    *,
    backbone: str | None = None,
    head: str = HEAD,
    shots: int | None = None,
    unknown: float | None = None,
    seed: int = 0,
) -> Labelled:
    """Learns the classes of one folder and labels the images of another.

    Args:
        support: a folder with a sub-folder of images for each class.
        queries: a folder of images, or of sub-folders of them; without it, only a head is made.
        backbone: a name for `load_backbone`, or `context`, the backbone of CAML.
        head: one of `HEADS`; by default the most accurate on validation tasks of that kind of images,
            strokes or pictures.
        shots: number of random images of each class to use; by default all.
        unknown: the part of images of the classes that may be called unknown; with it, others are.

    Raises:
        FlownError: an unknown head or backbone, or an unusable folder; the message says why. With
            `unknown`, no class has two images, or one is called so.
    """
    start = time.monotonic()
    if head not in (*HEADS, HEAD):
        raise errors.unknown("head", head, (*HEADS, HEAD))
    known, classes = read_pictures(Path(support), shots, seed)
    if head == HEAD:
        head = STROKES if backbone is None and are_strokes(known, len(classes)) else PICTURES
    name = backbone or (_TRAINED[head][1] if head in _TRAINED else BACKBONE)
    if unknown is not None and UNKNOWN in classes:
        raise FlownError(
            f"{support}: a class is called '{UNKNOWN}', the label of images of no class"
        )
    method = _method(head, name, known, classes)
    asked: folder.Queries | None = None
    warnings: list[str] = []
    if queries is not None:
        asked, warnings = folder.read_queries(Path(queries), Path(support), classes, method.see)
    warnings += folder.duplicates(known, asked)
    left_out, rows = method.calibrate()
    made = method.batch(classes, Path(support).resolve().name)
    probabilities = None if asked is None else method.probabilities(asked.seen)
    return Labelled(
        method=head,
        backbone=name,
        classes=classes,
        support=known,
        rows=rows,
        left_out=left_out,
        queries=asked,
        probabilities=probabilities,
        novelty=None if unknown is None or asked is None else method.novelty(unknown, asked.seen),
        head=made,
        temperature=method.tau,
        warnings=tuple(warnings),
        seconds=time.monotonic() - start,
    )


def _method(head: str, name: str, support: Pictures, classes: tuple[str, ...]) -> _Method | Written:
    trained, required = _TRAINED.get(head, ("", name))
    if name != required:
        raise FlownError(
            f"--head {head}: {trained} was trained on the features of '{required}', not of "
            f"'{name}'; leave --backbone out, or take another head"
        )
    if head == "written":
        return Written(support, classes)
    return _Method(head, name, support, len(classes))


class _Method:
    """A backbone and a kind of head, with the support's features z (S, F)."""

    def __init__(self, head: str, name: str, support: Pictures, ways: int) -> None:
        self.head, self.name, self.labels, self.ways = head, name, support.labels, ways
        self.caml: CAML | None = None
        self.backbone: nn.Module
        if name == CONTEXT:
            self.backbone, caml = context_backbone()
            self.caml = caml if head == "caml" else None
        else:
            self.backbone = load_backbone(name)
        found = folder.picture_features(self.backbone, support.images)
        folder.check_seen(found, support)
        centred = isinstance(self.backbone, Standardised)
        self.centre = torch.zeros(found.shape[1]) if centred else found.mean(dim=0)
        self.z = self._z(found)
        tau_1, tau_5 = _CAML_TAUS if self.caml else LINEAR[head].taus
        self.fewest = int(torch.bincount(support.labels, minlength=ways).min())
        self.tau = tau_1 * (tau_5 / tau_1) ** (math.log(min(self.fewest, 5)) / math.log(5))

    def _z(self, found: Tensor) -> Tensor:
        """Features for the head: centred and of length 1, for CAML unchanged."""
        return found if self.caml else F.normalize(found - self.centre, dim=1)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (T, N, W) before the division by tau."""
        if self.caml is not None:
            return caml_logits(self.caml, support, labels, query, ways)
        return apply_heads(LINEAR[self.head].heads(support, labels, ways), query)

    def calibrate(self) -> tuple[Tensor | None, Tensor]:
        """Fits tau where classes have two images; the left-out images' probabilities and rows."""
        if self.fewest < 2:
            return None, torch.empty(0, dtype=torch.long)
        logits, rows = calibrate.leave_one_out(self.logits, self.z, self.labels, self.ways)
        self.tau = calibrate.temperature(logits, self.labels[rows], self.tau)
        return (logits / self.tau).softmax(dim=1), rows

    def batch(self, classes: tuple[str, ...], task: str) -> WeightBatch | None:
        """The head as a network, 1 / tau included in its weights."""
        if self.caml is not None:
            return None
        weights = LINEAR[self.head].heads(self.z[None], self.labels[None], self.ways) / self.tau
        architecture = feature_head("normalised-head", len(self.centre), self.ways)
        layout = WeightLayout.of(NormalisedHead(len(self.centre), self.ways), architecture)
        about = Task(id=task, dataset=task, classes=classes)
        made = {
            "backbone": self.name,
            "method": self.head,
            "temperature": self.tau,
            "classes": list(classes),
        }
        return WeightBatch(layout, weights, made, frozen={"centre": self.centre}, task=about)

    def see(self, pictures: Sequence[Tensor]) -> Tensor:
        """Features z (N, F) of pictures."""
        return self._z(folder.picture_features(self.backbone, pictures))

    def probabilities(self, seen: Tensor) -> Tensor:
        """Probabilities (N, C) of pictures as `see` gives them."""
        logits = self.logits(self.z[None], self.labels[None], seen[None], self.ways)[0]
        found: Tensor = (logits / self.tau).softmax(dim=1)
        return found

    def novelty(self, rate: float, seen: Tensor) -> Tensor:
        """Distances (N,) from the nearest class, in units of what a part `rate` of them exceed."""

        def score(support: Support, asked: Tensor) -> Tensor:
            return distances(support.images[None], support.labels, self.ways, asked[None])

        support = Support(self.z, self.labels)
        most = limit(left_out(support, score), rate)
        return score(support, seen) / most


def context_backbone() -> tuple[Standardised, CAML]:
    """The backbone `context` and the CAML that was trained on its features."""
    encoder = SupportEncoder.pretrained()
    assert isinstance(encoder.backbone, Backbone)  # as shipped
    backbone = Standardised(encoder.backbone)
    backbone.mean.copy_(encoder.feature_mean)
    backbone.std.copy_(encoder.feature_std)
    return backbone, encoder.caml


def _csv(found: Labelled, queries: folder.Queries, probabilities: Tensor) -> str:
    """A row for each image: file, class, confidence, its true class if known, p of each class.

    Where it was asked, the class may be unknown, and the image's novelty stands at the end.
    """
    text, classes, novelty = io.StringIO(), found.classes, found.novelty
    rows = csv.writer(text, lineterminator="\n")
    any_known = bool((queries.labels >= 0).any())
    rows.writerow(
        [
            "file",
            "class",
            "confidence",
            *(["true class"] if any_known else []),
            *(f"p({name})" for name in classes),
            *(["novelty"] if novelty is not None else []),
        ]
    )
    for i, (file, p) in enumerate(zip(queries.files, probabilities, strict=True)):
        best, label = int(p.argmax()), int(queries.labels[i])
        true = [classes[label] if label >= 0 else ""] if any_known else []
        far = [] if novelty is None else [f"{float(novelty[i]):.4f}"]
        name = UNKNOWN if found.is_unknown(i) else classes[best]
        rows.writerow([file, name, f"{p[best]:.4f}", *true, *(f"{x:.4f}" for x in p), *far])
    return text.getvalue()
