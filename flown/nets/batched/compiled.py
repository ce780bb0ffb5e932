"""Plain networks on a CPU without a framework between their layers, compiled by numba.

Networks never meet: any number of them run beside each other in threads, and each gives the same
bits as it would alone. `program` lays a network out, `kernels` computes.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flown.nets.batched import kernels
from flown.nets.batched.jit import compiled
from flown.nets.batched.kernels import adam
from flown.nets.batched.program import ACTIVATION, GAP, WEIGHTED, At, Program

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


_LANES = 64  # images at a time: their activations stay in a core's own cache
_BLOCK = 16 * _LANES  # images a task of a thread


def logits(program: Program, images: Floats, vectors: Floats, threads: int) -> Floats:
    """Logits (n, N, C) of networks (n, D) for images (N, c, H, W), all contiguous."""
    pixels, classes = images.reshape(len(images), -1), int(program.layers[-1][At.Y_PLANES])
    found = np.empty((len(vectors), len(images), classes), np.float32)

    def one(part: tuple[int, int]) -> None:
        i, start = part
        block = slice(start, start + _BLOCK)
        _run(
            program.layers,
            program.taps,
            program.activations,
            program.tiles,
            program.choices,
            pixels[block],
            _LANES,
            vectors[i],
            found[i, block],
        )

    with ThreadPoolExecutor(threads) as pool:
        starts = range(0, len(images), _BLOCK)
        list(pool.map(one, ((i, start) for i in range(len(vectors)) for start in starts)))
    return found


def gradients(
    program: Program, images: Floats, vectors: Floats, above: Floats, threads: int
) -> Floats:
    """What gradients (n, N, C) of `logits` are for the weights: (n, D). Activations are computed anew."""
    pixels, found = images.reshape(len(images), -1), np.zeros_like(vectors)

    def one(i: int) -> None:
        _pull_back(
            program.layers,
            program.taps,
            program.activations,
            program.tiles,
            program.choices,
            pixels,
            _LANES,
            vectors[i],
            above[i],
            found[i],
        )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(vectors))))
    return found


def train_epoch(
    program: Program,
    images: Floats,
    rows: Integers,
    labels: Integers,
    batch: int,
    vector: Floats,
    moments: Floats,
    step: int,
    rates: NDArray[np.float64],
    decay: float,
) -> float:
    """Trains one network by Adam on images in order, in place; an incomplete last batch is left out.

    Args:
        images: (N, c, H, W), contiguous; rows: (K,), places in them; labels: (K,), theirs.
        vector: (D,), the weights. moments: (2, D), Adam's.
        step: how many steps have been made before. rates: (K // batch,), each step's own.
        decay: added to the gradient, weight times decay (Adam's, not AdamW's).

    Returns:
        The sum of the steps' losses; NaN or Inf when the network diverged.
    """
    total: float = _train_epoch(
        program.layers,
        program.taps,
        program.activations,
        program.tiles,
        program.choices,
        images.reshape(len(images), -1),
        rows,
        labels,
        batch,
        vector,
        moments,
        step,
        rates,
        decay,
    )
    return total


@compiled
def _tile(row, tiles):  # type: ignore[no-untyped-def]
    """A weighted layer's padded weights (O, T) and biases (O,), views."""
    out, ins = -(-row[At.Y_PLANES] // 4) * 4, -(-row[At.INPUTS] // 4) * 4
    start = row[At.TILE]
    weight = tiles[start : start + out * ins].reshape(out, ins)
    return weight, tiles[start + out * ins : start + out * ins + out]


@compiled
def _load(layers, vector, tiles):  # type: ignore[no-untyped-def]
    """Weight vector to tiles."""
    for row in layers:
        if row[At.KIND] == WEIGHTED:
            weight, bias = _tile(row, tiles)
            out, ins = row[At.Y_PLANES], row[At.INPUTS]
            start = row[At.WEIGHT]
            weight[:out, :ins] = vector[start : start + out * ins].reshape(out, ins)
            if row[At.BIAS] >= 0:
                bias[:out] = vector[row[At.BIAS] : row[At.BIAS] + out]


@compiled
def _forward(layers, taps, tiles, acts, which, lanes):  # type: ignore[no-untyped-def]
    """Fills the activations of all layers from the images at their beginning."""
    for row in layers:
        x, y = acts[row[At.X] * lanes :], acts[row[At.Y] * lanes :]
        plane, run, x_row = row[At.Y_PLANE] * lanes, row[At.COLUMNS] * lanes, row[At.X_ROW] * lanes
        if row[At.KIND] == ACTIVATION:
            length = row[At.Y_PLANES] * plane
            kernels.activate(x[:length], y[:length], row[At.FUNCTION])
            continue
        weight, bias = _tile(row, tiles)
        offsets = taps[row[At.TAPS] :]
        if row[At.WHICH] < 0:
            kernels.convolve(x, offsets, weight, bias, y, row[At.ROWS], run, x_row, plane)
            continue
        two, chosen = acts[row[At.ROWS_OF_TWO] * lanes :], which[row[At.WHICH] * lanes :]
        wide = row[At.CONVOLVED] * lanes
        two_plane = 2 * wide + GAP * lanes
        for r in range(row[At.ROWS]):
            kernels.convolve(
                x[2 * r * x_row :], offsets, weight, bias, two, 2, wide, x_row, two_plane
            )
            kernels.max_pool(
                two,
                y[r * run :],
                chosen[r * run :],
                row[At.Y_PLANES],
                row[At.COLUMNS],
                wide,
                two_plane,
                plane,
                lanes,
            )


@compiled
def _backward(layers, taps, tiles, found, acts, which, lanes):  # type: ignore[no-untyped-def]
    """Gradients of all layers from the last one's; weights' and biases' to `found`, as tiles."""
    for i in range(len(layers) - 1, -1, -1):
        row = layers[i]
        x, grad = acts[row[At.X] * lanes :], acts[row[At.GY] * lanes :]
        before = acts[max(row[At.GX], 0) * lanes :]
        plane, run, x_row = row[At.Y_PLANE] * lanes, row[At.COLUMNS] * lanes, row[At.X_ROW] * lanes
        length = row[At.Y_PLANES] * plane
        if row[At.KIND] == ACTIVATION:
            kernels.activation_gradient(
                x[:length],
                acts[row[At.Y] * lanes :][:length],
                grad[:length],
                before[:length],
                row[At.FUNCTION],
            )
            continue
        weight, _ = _tile(row, tiles)
        grad_weight, grad_bias = _tile(row, found)
        grad_weight[:] = 0
        for o in range(row[At.Y_PLANES]):
            grad_bias[o] = grad[o * plane :][:plane].sum()
        offsets, inputs, wanted = taps[row[At.TAPS] :], row[At.INPUTS], row[At.GX] >= 0
        if wanted:
            before[: row[At.X_PLANES] * row[At.X_PLANE] * lanes] = 0
        if row[At.WHICH] < 0:
            kernels.weight_gradient(x, offsets, grad, grad_weight, row[At.ROWS], run, x_row, plane)
            if wanted:
                kernels.input_gradient(
                    before, offsets, weight, grad, row[At.ROWS], run, x_row, plane, inputs
                )
            continue
        two, chosen = acts[row[At.ROWS_OF_TWO] * lanes :], which[row[At.WHICH] * lanes :]
        wide = row[At.CONVOLVED] * lanes
        two_plane = 2 * wide + GAP * lanes
        two[: row[At.Y_PLANES] * two_plane] = 0  # an odd last column is not pooled
        for r in range(row[At.ROWS]):
            kernels.max_pool_gradient(
                grad[r * run :],
                chosen[r * run :],
                two,
                row[At.Y_PLANES],
                row[At.COLUMNS],
                wide,
                two_plane,
                plane,
                lanes,
            )
            kernels.weight_gradient(
                x[2 * r * x_row :], offsets, two, grad_weight, 2, wide, x_row, two_plane
            )
            if wanted:
                kernels.input_gradient(
                    before[2 * r * x_row :], offsets, weight, two, 2, wide, x_row, two_plane, inputs
                )


@compiled
def _cross_entropy(logits, labels, grad):  # type: ignore[no-untyped-def]
    """Mean loss of logits (C, B), and its gradient."""
    classes, lanes = logits.shape
    total = 0.0
    for b in range(lanes):
        highest = logits[:, b].max()
        exps = np.exp(logits[:, b] - highest)
        whole = exps.sum()
        total += np.log(whole) - (logits[labels[b], b] - highest)
        for c in range(classes):
            grad[c, b] = (exps[c] / whole - (c == labels[b])) / lanes
    return total / lanes


@compiled
def _adam(layers, found, vector, moments, step, rate, decay):  # type: ignore[no-untyped-def]
    """One step for all layers, with L2 decay."""
    size, root = rate / (1 - 0.9**step), 1 / math.sqrt(1 - 0.999**step)
    for row in layers:
        if row[At.KIND] != WEIGHTED:
            continue
        weight, bias = _tile(row, found)
        for o in range(row[At.Y_PLANES]):
            at = row[At.WEIGHT] + o * row[At.INPUTS]
            mean, square = moments[0, at:], moments[1, at:]
            adam(weight[o, : row[At.INPUTS]], vector[at:], mean, square, size, root, decay, 1)
        if row[At.BIAS] >= 0:
            at = row[At.BIAS]
            mean, square = moments[0, at:], moments[1, at:]
            adam(bias[: row[At.Y_PLANES]], vector[at:], mean, square, size, root, decay, 1)


@compiled
def _gather(images, rows, acts):  # type: ignore[no-untyped-def]
    """Images (N, P) of `rows` to (P, B), in blocks that stay in the nearest cache."""
    lanes, pixels = len(rows), images.shape[1]
    for start in range(0, pixels, 16):
        end = min(start + 16, pixels)
        for b in range(lanes):
            image = images[rows[b]]
            for p in range(start, end):
                acts[p * lanes + b] = image[p]


@compiled
def _train_epoch(  # type: ignore[no-untyped-def]
    layers,
    taps,
    activations,
    tiles,
    choices,
    images,
    order,
    labels,
    batch,
    vector,
    moments,
    step,
    rates,
    decay,
):
    acts = np.zeros(activations * batch, np.float32)
    which = np.zeros(choices * batch, np.int8)
    loaded, found = np.zeros(tiles, np.float32), np.zeros(tiles, np.float32)
    last = layers[-1]
    classes, plane = last[At.Y_PLANES], last[At.Y_PLANE] * batch
    logits = acts[last[At.Y] * batch :][: classes * plane].reshape(classes, plane)[:, :batch]
    grad = acts[last[At.GY] * batch :][: classes * plane].reshape(classes, plane)[:, :batch]
    offsets, total = taps * batch, 0.0
    for k in range(len(order) // batch):
        rows = order[k * batch : (k + 1) * batch]
        _gather(images, rows, acts)
        _load(layers, vector, loaded)
        _forward(layers, offsets, loaded, acts, which, batch)
        total += _cross_entropy(logits, labels[k * batch : (k + 1) * batch], grad)
        _backward(layers, offsets, loaded, found, acts, which, batch)
        _adam(layers, found, vector, moments, step + k + 1, rates[k], decay)
    return total


@compiled
def _run(layers, taps, activations, tiles, choices, images, lanes, vector, found):  # type: ignore[no-untyped-def]
    acts, which = np.zeros(activations * lanes, np.float32), np.zeros(choices * lanes, np.int8)
    loaded = np.zeros(tiles, np.float32)
    _load(layers, vector, loaded)
    last, classes = layers[-1], found.shape[1]
    for start in range(0, len(images), lanes):
        lanes = min(lanes, len(images) - start)
        _gather(images, np.arange(start, start + lanes), acts)
        _forward(layers, taps * lanes, loaded, acts, which, lanes)
        plane = last[At.Y_PLANE] * lanes
        y = acts[last[At.Y] * lanes :]
        for c in range(classes):
            for b in range(lanes):
                found[start + b, c] = y[c * plane + b]


@compiled
def _pull_back(  # type: ignore[no-untyped-def]
    layers, taps, activations, tiles, choices, images, lanes, vector, above, total
):
    """Adds one network's gradients, from those of its logits (N, C), to `total` (D,)."""
    acts, which = np.zeros(activations * lanes, np.float32), np.zeros(choices * lanes, np.int8)
    loaded, found = np.zeros(tiles, np.float32), np.zeros(tiles, np.float32)
    _load(layers, vector, loaded)
    last, classes = layers[-1], above.shape[1]
    for start in range(0, len(images), lanes):
        lanes = min(lanes, len(images) - start)
        _gather(images, np.arange(start, start + lanes), acts)
        _forward(layers, taps * lanes, loaded, acts, which, lanes)
        plane = last[At.Y_PLANE] * lanes
        grad = acts[last[At.GY] * lanes :]
        for c in range(classes):
            grad[c * plane : (c + 1) * plane] = 0
            for b in range(lanes):
                grad[c * plane + b] = above[start + b, c]
        _backward(layers, taps * lanes, loaded, found, acts, which, lanes)
        for row in layers:
            if row[At.KIND] == WEIGHTED:
                weight, bias = _tile(row, found)
                for o in range(row[At.Y_PLANES]):
                    at = row[At.WEIGHT] + o * row[At.INPUTS]
                    for j in range(row[At.INPUTS]):
                        total[at + j] += weight[o, j]
                    if row[At.BIAS] >= 0:
                        total[row[At.BIAS] + o] += bias[o]
