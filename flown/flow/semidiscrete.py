"""Semi-discrete optimal transport: each noise has one network of its task to travel to.

    partner(x_0) = argmax_i s_i(x_0),   s_i = <x_0, x_i> - |x_i|^2 / 2 + g_i,   x_i of one task
    g maximises  mean_i g_i - E max_i s_i(x_0):   each x_i is the partner of about as much noise

(Mousavi-Hosseini et al. 2509.25519.) A batch re-ordered by optimal transport still sends neighbouring
noise to different networks, from one batch to the next; this does not. Paths do not cross, one point
has one velocity, and a flow that has learnt them is straight: a few steps follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.base.progress import bar
from flown.flow.source import Source

SEMI_DISCRETE = "semi-discrete"  # the coupling's name
_BATCH = 2048  # samples of x_0 a step of ascent
_BATCHES = 32  # that are drawn for a layout, once
_DRAWN = 2**27  # numbers that they have at most
_RATE = 0.1  # in units of the networks' spread, for a network with no partner


class SemiDiscrete:
    """The partners of source samples among networks.

    Args:
        x1: networks (n, *L), or the first of a path's marginals.
        groups, layouts: (n,), of each network; those of a group have one layout.
        source: the law of x_0, of layouts.
        seed: of the samples of x_0 that the potentials are fitted on.
    """

    def __init__(
        self, x1: Tensor, groups: Tensor, layouts: Tensor, source: Source, seed: int
    ) -> None:
        self.x1, self.potentials = x1.flatten(1), x1.new_empty(len(x1))
        self.rows = {
            group: (groups == group).nonzero().flatten() for group in groups.unique().tolist()
        }
        generator, drawn = torch.Generator(x1.device).manual_seed(seed), dict[int, list[Tensor]]()
        with bar("optimal transport", len(self.rows)) as update:
            for done, rows in enumerate(self.rows.values()):
                layout = layouts[rows[:1]]
                if int(layout) not in drawn:
                    many, room = layout.expand(_BATCH), _DRAWN // (_BATCH * self.x1.shape[1])
                    drawn[int(layout)] = [
                        source.sample(many, generator).flatten(1)
                        for _ in range(max(1, min(_BATCHES, room)))
                    ]
                self.potentials[rows] = _potentials(self.x1[rows], drawn[int(layout)])
                update(done + 1, "")

    @torch.no_grad()
    def __call__(self, x0: Tensor, groups: Tensor) -> Tensor:
        """The place (B,) of each sample's partner; x0 (B, *L) of groups (B,)."""
        found = torch.empty_like(groups)
        for group in groups.unique().tolist():
            of, rows = groups == group, self.rows[group]
            scores = _scores(x0[of].flatten(1), self.x1[rows], self.potentials[rows])
            found[of] = rows[scores.argmax(dim=1)]
        return found


def _scores(x0: Tensor, x1: Tensor, potentials: Tensor) -> Tensor:
    """s (B, n)."""
    return x0 @ x1.mT - x1.square().sum(dim=1) / 2 + potentials


def _potentials(x1: Tensor, noise: list[Tensor]) -> Tensor:
    """g (n,) by stochastic ascent, the mean of its second half; the dual is concave in g."""
    n = len(x1)
    steps = max(200, min(2000, 2 * n)) if n > 1 else 0
    g, mean = x1.square().sum(dim=1) / 2, x1.new_zeros(n)  # all the same to noise of mean zero
    rate = _RATE * (x1 - x1.mean(dim=0)).norm(dim=1).mean()
    for step in range(steps):
        x0 = noise[step % len(noise)]
        won = _scores(x0, x1, g).argmax(dim=1).bincount(minlength=n)
        share = won * n / len(x0)  # 1 for each, at the end
        g = g + rate * (1 + step / 20) ** -0.5 * (1 - share).clamp(min=-3)
        mean += g / (steps - steps // 2) if step >= steps // 2 else 0
    return mean
