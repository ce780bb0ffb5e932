"""Convolution, pooling, activation and Adam for one network, compiled; the images are the lanes.

A batch's activations lie (channels, rows, columns, B): a row of columns * B numbers is contiguous,
and every inner loop runs along it, whatever the layer. Four outputs and four inputs are worked on
at a time, so that a number once loaded serves four products. A linear layer is a convolution with
one position, flattening is nothing at all. All of a small network's activations stay in a core's
own cache, and there is no framework between two operations: this is the whole gain.

Kernels here know neither torch nor modules; `flown.nets.batched.compiled` translates.
"""

from __future__ import annotations

import math

import numpy as np

from flown.nets.batched.jit import compiled

TILE = 4  # outputs and inputs worked on together
TANH, GELU, RELU, LEAKY_RELU, SILU, SIGMOID = range(6)


@compiled
def convolve(x, offsets, weight, bias, y, rows, run, x_row, plane):  # type: ignore[no-untyped-def]
    """y[o, r] = bias[o] + sum_t weight[o, t] x[offsets[t] + r * x_row :], rows of `run` numbers.

    `weight` is (O, T), both multiples of four; the planes y[o] lie `plane` numbers apart.
    """
    for r in range(rows):
        for o in range(0, len(weight), 4):
            at = o * plane + r * run
            y0 = y[at:][:run]
            y1 = y[at + plane :][:run]
            y2 = y[at + 2 * plane :][:run]
            y3 = y[at + 3 * plane :][:run]
            y0[:] = bias[o]
            y1[:] = bias[o + 1]
            y2[:] = bias[o + 2]
            y3[:] = bias[o + 3]
            for t in range(0, weight.shape[1], 4):
                x0 = x[offsets[t] + r * x_row :][:run]
                x1 = x[offsets[t + 1] + r * x_row :][:run]
                x2 = x[offsets[t + 2] + r * x_row :][:run]
                x3 = x[offsets[t + 3] + r * x_row :][:run]
                _add_products(y0, y1, y2, y3, x0, x1, x2, x3, weight[o : o + 4, t : t + 4])


@compiled
def _add_products(y0, y1, y2, y3, x0, x1, x2, x3, w):  # type: ignore[no-untyped-def]
    a0, a1, a2, a3 = w[0, 0], w[0, 1], w[0, 2], w[0, 3]
    b0, b1, b2, b3 = w[1, 0], w[1, 1], w[1, 2], w[1, 3]
    c0, c1, c2, c3 = w[2, 0], w[2, 1], w[2, 2], w[2, 3]
    d0, d1, d2, d3 = w[3, 0], w[3, 1], w[3, 2], w[3, 3]
    for j in range(len(y0)):
        u0, u1, u2, u3 = x0[j], x1[j], x2[j], x3[j]
        y0[j] += a0 * u0 + a1 * u1 + a2 * u2 + a3 * u3
        y1[j] += b0 * u0 + b1 * u1 + b2 * u2 + b3 * u3
        y2[j] += c0 * u0 + c1 * u1 + c2 * u2 + c3 * u3
        y3[j] += d0 * u0 + d1 * u1 + d2 * u2 + d3 * u3


@compiled
def weight_gradient(x, offsets, grad, found, rows, run, x_row, plane):  # type: ignore[no-untyped-def]
    """found[o, t] += sum over rows of <grad[o, r], x[offsets[t] + r * x_row :]>."""
    for r in range(rows):
        for o in range(0, len(found), 4):
            at = o * plane + r * run
            g0 = grad[at:][:run]
            g1 = grad[at + plane :][:run]
            g2 = grad[at + 2 * plane :][:run]
            g3 = grad[at + 3 * plane :][:run]
            for t in range(0, found.shape[1], 4):
                x0 = x[offsets[t] + r * x_row :][:run]
                x1 = x[offsets[t + 1] + r * x_row :][:run]
                x2 = x[offsets[t + 2] + r * x_row :][:run]
                x3 = x[offsets[t + 3] + r * x_row :][:run]
                _add_dots(g0, g1, g2, g3, x0, x1, x2, x3, found[o : o + 4, t : t + 4])


@compiled
def _add_dots(g0, g1, g2, g3, x0, x1, x2, x3, w):  # type: ignore[no-untyped-def]
    zero = np.float32(0)
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = zero
    for j in range(len(g0)):
        u0, u1, u2, u3 = x0[j], x1[j], x2[j], x3[j]
        p, q, r, s = g0[j], g1[j], g2[j], g3[j]
        a0 += p * u0
        a1 += p * u1
        a2 += p * u2
        a3 += p * u3
        b0 += q * u0
        b1 += q * u1
        b2 += q * u2
        b3 += q * u3
        c0 += r * u0
        c1 += r * u1
        c2 += r * u2
        c3 += r * u3
        d0 += s * u0
        d1 += s * u1
        d2 += s * u2
        d3 += s * u3
    w[0, 0] += a0
    w[0, 1] += a1
    w[0, 2] += a2
    w[0, 3] += a3
    w[1, 0] += b0
    w[1, 1] += b1
    w[1, 2] += b2
    w[1, 3] += b3
    w[2, 0] += c0
    w[2, 1] += c1
    w[2, 2] += c2
    w[2, 3] += c3
    w[3, 0] += d0
    w[3, 1] += d1
    w[3, 2] += d2
    w[3, 3] += d3


@compiled
def input_gradient(found, offsets, weight, grad, rows, run, x_row, plane, taps):  # type: ignore[no-untyped-def]
    """found[offsets[t] + r * x_row :] += sum_o weight[o, t] grad[o, r]."""
    for r in range(rows):
        for o in range(0, len(weight), 4):
            at = o * plane + r * run
            g0 = grad[at:][:run]
            g1 = grad[at + plane :][:run]
            g2 = grad[at + 2 * plane :][:run]
            g3 = grad[at + 3 * plane :][:run]
            for t in range(taps):
                target = found[offsets[t] + r * x_row :][:run]
                w0, w1, w2, w3 = weight[o, t], weight[o + 1, t], weight[o + 2, t], weight[o + 3, t]
                for j in range(run):
                    target[j] += w0 * g0[j] + w1 * g1[j] + w2 * g2[j] + w3 * g3[j]


@compiled
def max_pool(x, y, which, planes, columns, x_row, x_plane, y_plane, lanes):  # type: ignore[no-untyped-def]
    """One row of 2x2 maxima a plane and which of the four they are, the first of equals."""
    for plane in range(planes):
        above, below = x[plane * x_plane :], x[plane * x_plane + x_row :]
        best, chosen = y[plane * y_plane :], which[plane * y_plane :]
        for k in range(columns):
            a, b = above[2 * k * lanes :][:lanes], above[(2 * k + 1) * lanes :][:lanes]
            c, d = below[2 * k * lanes :][:lanes], below[(2 * k + 1) * lanes :][:lanes]
            most, one = best[k * lanes :][:lanes], chosen[k * lanes :][:lanes]
            for j in range(lanes):
                top, bottom = max(a[j], b[j]), max(c[j], d[j])
                upper = 0 if a[j] >= b[j] else 1
                lower = 2 if c[j] >= d[j] else 3
                most[j] = max(top, bottom)
                one[j] = upper if top >= bottom else lower


@compiled
def max_pool_gradient(grad, which, found, planes, columns, x_row, x_plane, y_plane, lanes):  # type: ignore[no-untyped-def]
    """Sends a row's gradients to the one of the four that was the maximum; the others get zero."""
    zero = np.float32(0)
    for plane in range(planes):
        above, below = found[plane * x_plane :], found[plane * x_plane + x_row :]
        grads, chosen = grad[plane * y_plane :], which[plane * y_plane :]
        for k in range(columns):
            a, b = above[2 * k * lanes :][:lanes], above[(2 * k + 1) * lanes :][:lanes]
            c, d = below[2 * k * lanes :][:lanes], below[(2 * k + 1) * lanes :][:lanes]
            g, one = grads[k * lanes :][:lanes], chosen[k * lanes :][:lanes]
            for j in range(lanes):
                a[j] = g[j] if one[j] == 0 else zero
                b[j] = g[j] if one[j] == 1 else zero
                c[j] = g[j] if one[j] == 2 else zero
                d[j] = g[j] if one[j] == 3 else zero


@compiled
def _clip(x, bound):  # type: ignore[no-untyped-def]
    """x within -bound..bound; NaN, which `min` and `max` would swallow, stays NaN."""
    x = bound if x > bound else x
    return -bound if x < -bound else x


@compiled
def _tanh(x):  # type: ignore[no-untyped-def]
    """A rational minimax approximation in float32, within 3e-7 (the coefficients are Eigen's)."""
    x = _clip(x, np.float32(7.90531110763549805))
    s = x * x
    p = np.float32(-2.76076847742355e-16)
    p = p * s + np.float32(2.00018790482477e-13)
    p = p * s + np.float32(-8.60467152213735e-11)
    p = p * s + np.float32(5.12229709037114e-08)
    p = p * s + np.float32(1.48572235717979e-05)
    p = p * s + np.float32(6.37261928875436e-04)
    p = p * s + np.float32(4.89352455891786e-03)
    q = np.float32(1.19825839466702e-06)
    q = q * s + np.float32(1.18534705686654e-04)
    q = q * s + np.float32(2.26843463243900e-03)
    q = q * s + np.float32(4.89352518554385e-03)
    return x * p / q


@compiled
def _erf(x):  # type: ignore[no-untyped-def]
    """A rational minimax approximation in float32, within 3e-7 (the coefficients are Eigen's)."""
    x = _clip(x, np.float32(4))
    s = x * x
    p = np.float32(-2.72614225801306e-10)
    p = p * s + np.float32(2.77068142495902e-08)
    p = p * s + np.float32(-2.10102402082508e-06)
    p = p * s + np.float32(-5.69250639462346e-05)
    p = p * s + np.float32(-7.34990630326855e-04)
    p = p * s + np.float32(-2.95459980854025e-03)
    p = p * s + np.float32(-1.60960333262415e-02)
    q = np.float32(-1.45660718464996e-05)
    q = q * s + np.float32(-2.13374055278905e-04)
    q = q * s + np.float32(-1.68282697438203e-03)
    q = q * s + np.float32(-7.37332916720468e-03)
    q = q * s + np.float32(-1.42647390514189e-02)
    return x * p / q


@compiled
def activate(x, y, kind):  # type: ignore[no-untyped-def]
    """y = f(x), elementwise."""
    half, one, zero = np.float32(0.5), np.float32(1), np.float32(0)
    if kind == TANH:
        for j in range(len(x)):
            y[j] = _tanh(x[j])
    elif kind == GELU:
        for j in range(len(x)):
            y[j] = half * x[j] * (one + _erf(x[j] * np.float32(math.sqrt(0.5))))
    elif kind == RELU:
        for j in range(len(x)):
            y[j] = zero if x[j] < zero else x[j]  # NaN stays NaN
    elif kind == LEAKY_RELU:
        for j in range(len(x)):
            y[j] = x[j] if x[j] > zero else np.float32(0.01) * x[j]
    elif kind == SILU:
        for j in range(len(x)):
            y[j] = half * x[j] * (one + _tanh(half * x[j]))
    else:
        for j in range(len(x)):
            y[j] = half * (one + _tanh(half * x[j]))


@compiled
def activation_gradient(x, y, grad, found, kind):  # type: ignore[no-untyped-def]
    """found = grad f'(x), with y = f(x)."""
    half, one, zero = np.float32(0.5), np.float32(1), np.float32(0)
    if kind == TANH:
        for j in range(len(x)):
            found[j] = grad[j] * (one - y[j] * y[j])
    elif (
        kind == GELU
    ):  # Phi(x) + x phi(x), with exp(-x^2 / 2) = (1 - t) / (1 + t), t = tanh(x^2 / 4)
        for j in range(len(x)):
            phi = half * (one + _erf(x[j] * np.float32(math.sqrt(0.5))))
            t = _tanh(np.float32(0.25) * x[j] * x[j])
            density = np.float32(1 / math.sqrt(2 * math.pi)) * (one - t) / (one + t)
            found[j] = grad[j] * (phi + x[j] * density)
    elif kind == RELU:
        for j in range(len(x)):
            found[j] = grad[j] if x[j] > zero else zero
    elif kind == LEAKY_RELU:
        for j in range(len(x)):
            found[j] = grad[j] if x[j] > zero else np.float32(0.01) * grad[j]
    elif kind == SILU:  # s (1 + x (1 - s)), s the sigmoid
        for j in range(len(x)):
            s = half * (one + _tanh(half * x[j]))
            found[j] = grad[j] * s * (one + x[j] * (one - s))
    else:
        for j in range(len(x)):
            found[j] = grad[j] * y[j] * (one - y[j])


@compiled
def adam(gradient, vector, mean, square, rate, root, decay, keep):  # type: ignore[no-untyped-def]
    """A step of Adam (Kingma and Ba 2015) with PyTorch's defaults.

    `rate` and `root` hold the corrections of both moments; `decay` times the weight is added to the
    gradient, the weight itself is multiplied by `keep` (AdamW).
    """
    rate, root = np.float32(rate), np.float32(root)
    decay, keep = np.float32(decay), np.float32(keep)
    for j in range(len(gradient)):
        g = gradient[j] + decay * vector[j]
        mean[j] = np.float32(0.9) * mean[j] + np.float32(0.1) * g
        square[j] = np.float32(0.999) * square[j] + np.float32(0.001) * g * g
        step = rate * mean[j] / (math.sqrt(square[j]) * root + np.float32(1e-8))
        vector[j] = keep * vector[j] - step
