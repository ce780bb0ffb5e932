"""Side-by-side timings: every ratio is measured in one run, medians over several repeats."""

from flown.bench.adapt import adapt
from flown.bench.anytask import anytask
from flown.bench.encode import encode
from flown.bench.evaluate import evaluate
from flown.bench.heads import heads
from flown.bench.sample import sample
from flown.bench.store import store
from flown.bench.timing import BenchConfig, show, write
from flown.bench.zoo import zoo

__all__ = [
    "BenchConfig",
    "adapt",
    "anytask",
    "encode",
    "evaluate",
    "heads",
    "sample",
    "show",
    "store",
    "write",
    "zoo",
]
