"""Linear probes of many few-shot tasks at once, against a loop of one task at a time in PyTorch."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.provenance import Row
from flown.bench.timing import medians, timed_rows
from flown.heads.classifiers import apply_heads
from flown.heads.heads import HeadsConfig, shard_tasks, train_heads
from flown.heads.probe import ProbeConfig, probe
from flown.tasks import ClassPool

FEATURES, CLASSES, IMAGES = 512, 64, 120  # as with ResNet-12 on mini-ImageNet's base classes
_APART = 0.2  # deviation of class means, images have 1: about as hard as real features
_COMPARED = 200  # tasks that both candidates probe


def heads(repeats: int, scratch: Path, tasks: int = 50_000, compared: int = _COMPARED) -> list[Row]:
    """Seconds for a zoo of all heads; seconds and accuracies of a part, beside those of a loop.

    Features are Gaussian classes. The loop makes an `nn.Linear` and an `AdamW` for every task; of its
    settings (fused, for-each, one tensor at a time; one thread or all) the fastest is its best.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(IMAGES)
    means = _APART * torch.randn(CLASSES, FEATURES, generator=generator)
    features = means[labels] + torch.randn(len(labels), FEATURES, generator=generator)
    config, classes = HeadsConfig(tasks=tasks), torch.arange(CLASSES)
    probe(features[None, :5], 5, ProbeConfig(epochs=1))  # compiled, or read from numba's cache
    start = time.perf_counter()
    zoo = train_heads(features, labels, classes, scratch / "heads", config)
    whole = time.perf_counter() - start
    shard = shard_tasks(
        features, ClassPool(labels, classes), HeadsConfig(tasks=compared, seed=1), 0
    )
    first = _fresh(compared, shard.ways, generator)
    candidates = {"flown": partial(probe, shard.support, shard.ways, start=first)}
    for threads in sorted({1, torch.get_num_threads()}):
        for way in ("fused", "foreach", "single"):
            candidates[f"loop-{way}-{threads}-threads"] = partial(
                loop, shard.support, shard.ways, first, way, threads
            )
    rows = timed_rows(medians(candidates, repeats), "flown", compared)
    rows.append(
        {
            **rows[0],
            "method": "flown-zoo",
            "value": whole,
            "std": None,
            "n": len(zoo),
            "selection": "median of 1",
        }
    )
    del rows[-1]["ratio"]
    for name in ("flown", f"loop-fused-{torch.get_num_threads()}-threads"):
        found = apply_heads(candidates[name](), shard.query).argmax(dim=2)
        accuracy = 100 * (found == shard.targets).float().mean(dim=1)
        rows.append(
            {
                **rows[0],
                "method": name.split("-")[0],
                "metric": "accuracy",
                "std": float(accuracy.std()),
                "value": float(accuracy.mean()),
                "n": compared,
                "selection": "all",
            }
        )
        del rows[-1]["ratio"]
    return rows


def loop(support: Tensor, ways: int, start: Tensor, way: str, threads: int) -> Tensor:
    """Heads (T, W F + W), each a module of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    labels = torch.arange(ways).repeat_interleave(support.shape[1] // ways)
    config, found = ProbeConfig(), []
    for images, vector in zip(support, start, strict=True):
        linear = nn.Linear(support.shape[2], ways)
        nn.utils.vector_to_parameters(vector.clone(), linear.parameters())
        optimizer = torch.optim.AdamW(
            linear.parameters(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=way == "fused",
            foreach=way == "foreach",
        )
        for _ in range(config.epochs):
            optimizer.zero_grad()
            F.cross_entropy(linear(images), labels).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(linear.parameters()).detach())
    torch.set_num_threads(before)
    return torch.stack(found)


def _fresh(tasks: int, ways: int, generator: torch.Generator) -> Tensor:
    """Heads as `nn.Linear` initialises them."""
    uniform = torch.rand(tasks, ways * FEATURES + ways, generator=generator)
    heads: Tensor = (2 * uniform - 1) / FEATURES**0.5
    return heads
