"""Linear probes of many few-shot tasks at once, compiled: softmax regression by AdamW on the whole support.

    l = X w^T + b,  g = (softmax(l) - onehot(y)) / N
    m <- 0.9 m + 0.1 dw,  v <- 0.999 v + 0.001 dw^2                       with dw = g^T X
    w <- (1 - eta lambda) w - eta m_hat / (sqrt(v_hat) + 1e-8)            (Loshchilov and Hutter)

The steps are those of `nn.Linear` and `torch.optim.AdamW`, task by task: support, weights and moments of a
task stay in the cache of one core for all of its steps, and no framework runs between two steps.
Weights of a task are the vector of nn.Linear(F, W).named_parameters(): weight (W, F), bias (W,).

Axes: T tasks, N support images sorted by class, F features, W ways.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.nets.batched.jit import compiled
from flown.nets.batched.kernels import adam

_CLASSES, _IMAGES = 5, 4  # worked on together: a loaded number serves several products
_BLOCK = 64  # tasks a thread takes at once


class ProbeConfig(Config):
    """AdamW on the whole support at each epoch; the defaults are FLoWN's."""

    epochs: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


def probe(
    support: Tensor, ways: int, config: ProbeConfig | None = None, start: Tensor | None = None
) -> Tensor:
    """Probed heads (T, W*F + W) of tasks.

    Args:
        support: features (T, W*K, F), sorted by class.
        start: heads (T, W*F + W) to start from; zeros otherwise, where all classes are alike.

    Raises:
        FlownError: support or start of another shape.
    """
    config = config or ProbeConfig()
    if support.ndim != 3 or ways < 2 or not support.shape[1] or support.shape[1] % ways:
        raise FlownError(
            f"probe: expected a support (T, {ways} ways * shots, F), got {tuple(support.shape)}"
        )
    tasks, _, size = support.shape
    shape = (tasks, ways * size + ways)
    if start is not None and tuple(start.shape) != shape:
        raise FlownError(f"probe: expected a start {shape}, got {tuple(start.shape)}")
    heads = torch.zeros(shape) if start is None else start.detach().float().cpu().clone()
    x, w = support.detach().float().cpu().contiguous().numpy(), heads.numpy()

    def probe_block(first: int) -> None:
        part = slice(first, first + _BLOCK)
        _probe(x[part], w[part], ways, config.epochs, config.learning_rate, config.weight_decay)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(probe_block, range(0, tasks, _BLOCK)))
    return heads.to(support.device)


@compiled
def _probe(support, heads, ways, epochs, rate, decay):  # type: ignore[no-untyped-def]
    """Trains heads (T, W*F + W) in place."""
    tasks, count, size = support.shape
    tall, wide = -(-count // _IMAGES) * _IMAGES, -(-ways // _CLASSES) * _CLASSES
    x, logits = np.zeros((tall, size), np.float32), np.zeros((tall, wide), np.float32)
    weight, grad = np.zeros((wide, size), np.float32), np.zeros((wide, size), np.float32)
    m, v = np.zeros(heads.shape[1], np.float32), np.zeros(heads.shape[1], np.float32)
    d_bias = np.zeros(ways, np.float32)
    for t in range(tasks):
        x[:count] = support[t]
        weight[:ways] = heads[t, : ways * size].reshape(ways, size)
        bias = heads[t, ways * size :]
        m[:] = 0
        v[:] = 0
        for step in range(1, epochs + 1):
            for n in range(0, tall, _IMAGES):
                for k in range(0, wide, _CLASSES):
                    _dots(
                        x[n],
                        x[n + 1],
                        x[n + 2],
                        x[n + 3],
                        weight[k : k + _CLASSES],
                        logits[n : n + _IMAGES, k : k + _CLASSES],
                    )
            _residuals(logits, bias, d_bias, count)
            grad[:] = 0
            for n in range(0, tall, _IMAGES):
                for k in range(0, wide, _CLASSES):
                    _products(
                        x[n],
                        x[n + 1],
                        x[n + 2],
                        x[n + 3],
                        grad[k : k + _CLASSES],
                        logits[n : n + _IMAGES, k : k + _CLASSES],
                    )
            size_1, keep = rate / (1 - 0.9**step), 1 - rate * decay
            root_2 = 1 / math.sqrt(1 - 0.999**step)
            for k in range(ways):
                part = slice(k * size, (k + 1) * size)
                adam(grad[k], weight[k], m[part], v[part], size_1, root_2, 0, keep)
            last = slice(ways * size, len(m))
            adam(d_bias, bias, m[last], v[last], size_1, root_2, 0, keep)
        heads[t, : ways * size] = weight[:ways].reshape(-1)


@compiled
def _residuals(logits, bias, d_bias, count):  # type: ignore[no-untyped-def]
    """Logits without bias become (softmax - onehot) / count, rows beyond `count` zero."""
    ways = len(bias)
    shots, scale = count // ways, np.float32(1 / count)
    d_bias[:] = 0
    for n in range(count):
        row = logits[n, :ways]
        largest = np.float32(-np.inf)
        for k in range(ways):
            row[k] += bias[k]
            largest = max(largest, row[k])
        total = np.float32(0)
        for k in range(ways):
            row[k] = math.exp(row[k] - largest)
            total += row[k]
        for k in range(ways):
            row[k] *= scale / total
        row[n // shots] -= scale
        for k in range(ways):
            d_bias[k] += row[k]
    logits[count:] = 0


@compiled
def _dots(x0, x1, x2, x3, w, y):  # type: ignore[no-untyped-def]
    """y[n, k] = <x_n, w_k> for four images and five classes."""
    w0, w1, w2, w3, w4 = w[0], w[1], w[2], w[3], w[4]
    zero = np.float32(0)
    a0 = a1 = a2 = a3 = a4 = b0 = b1 = b2 = b3 = b4 = zero
    c0 = c1 = c2 = c3 = c4 = d0 = d1 = d2 = d3 = d4 = zero
    for j in range(len(x0)):
        p, q, r, s, t = w0[j], w1[j], w2[j], w3[j], w4[j]
        e, f, g, h = x0[j], x1[j], x2[j], x3[j]
        a0 += e * p
        a1 += e * q
        a2 += e * r
        a3 += e * s
        a4 += e * t
        b0 += f * p
        b1 += f * q
        b2 += f * r
        b3 += f * s
        b4 += f * t
        c0 += g * p
        c1 += g * q
        c2 += g * r
        c3 += g * s
        c4 += g * t
        d0 += h * p
        d1 += h * q
        d2 += h * r
        d3 += h * s
        d4 += h * t
    y[0, 0], y[0, 1], y[0, 2], y[0, 3], y[0, 4] = a0, a1, a2, a3, a4
    y[1, 0], y[1, 1], y[1, 2], y[1, 3], y[1, 4] = b0, b1, b2, b3, b4
    y[2, 0], y[2, 1], y[2, 2], y[2, 3], y[2, 4] = c0, c1, c2, c3, c4
    y[3, 0], y[3, 1], y[3, 2], y[3, 3], y[3, 4] = d0, d1, d2, d3, d4


@compiled
def _products(x0, x1, x2, x3, w, y):  # type: ignore[no-untyped-def]
    """w_k += sum_n y[n, k] x_n for four images and five classes."""
    w0, w1, w2, w3, w4 = w[0], w[1], w[2], w[3], w[4]
    a0, a1, a2, a3, a4 = y[0, 0], y[0, 1], y[0, 2], y[0, 3], y[0, 4]
    b0, b1, b2, b3, b4 = y[1, 0], y[1, 1], y[1, 2], y[1, 3], y[1, 4]
    c0, c1, c2, c3, c4 = y[2, 0], y[2, 1], y[2, 2], y[2, 3], y[2, 4]
    d0, d1, d2, d3, d4 = y[3, 0], y[3, 1], y[3, 2], y[3, 3], y[3, 4]
    for j in range(len(x0)):
        e, f, g, h = x0[j], x1[j], x2[j], x3[j]
        w0[j] += a0 * e + b0 * f + c0 * g + d0 * h
        w1[j] += a1 * e + b1 * f + c1 * g + d1 * h
        w2[j] += a2 * e + b2 * f + c2 * g + d2 * h
        w3[j] += a3 * e + b3 * f + c3 * g + d3 * h
        w4[j] += a4 * e + b4 * f + c4 * g + d4 * h
