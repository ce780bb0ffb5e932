"""Networks of one layout brought into one order of units: weight matching to a reference.

    minimise over P    |w_ref - P w|^2,    that is: maximise <w_ref, P w>

where P permutes the units of every group, and flips their signs where that is a symmetry
(`nets.symmetry`). For one group, with the others fixed, this is a linear assignment over S_ij =
<unit i of w_ref, unit j of w>; the groups are matched in turn until none changes (Git Re-Basin,
Ainsworth et al., 2209.04836, algorithm 1). Where signs may flip, |S| replaces S, and the matched
entry's sign is the unit's. Tensors are not scaled to a common size: networks halfway between two
were no better for it.

Ascent ends in a local optimum, so it starts three times: from the order as it is, and after one
sweep from the inputs up or from the outputs down, in which a tensor counts only if its other units
are in order already. The sweep from the inputs finds a permuted copy exactly. The best of the three
is kept.

With permutations as indices p (n, size) and signs s, unit i of the new network is s_i times unit
p_i of the old network. An aligned network computes the same function as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import check_finite
from flown.nets.structure import symmetry
from flown.nets.structure.symmetry import Group
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout

Orders = list[tuple[Tensor, Tensor]]  # for each group indices and signs, (n, size) both
_PART = 128  # networks


@dataclass(frozen=True)
class Aligned:
    """Networks in the order of `reference` (D,), with their permutations.

    `permutations` and `signs` hold (n, size) for each group; with them `permute` turns the former
    networks into `batch`. `rounds` counts the means that were taken.
    """

    batch: WeightBatch
    groups: tuple[Group, ...]
    permutations: tuple[Tensor, ...]
    signs: tuple[Tensor, ...]
    reference: Tensor
    rounds: int


def permute(
    tensors: Mapping[str, Tensor],
    groups: Sequence[Group],
    permutations: Sequence[Tensor],
    signs: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gives each of n networks its own order of units.

    Args:
        tensors: stacked state dicts, name -> (n, *shape); tensors without a group are passed on.
        permutations: for each group int64 (n, size); unit i is taken from unit p_i.
        signs: for each group (n, size) of 1 and -1, the factors of the new units.

    Raises:
        FlownError: a tensor of a group is missing, or a group whose units have no sign is flipped.
    """
    out = dict(tensors)
    for k, (group, order) in enumerate(zip(groups, permutations, strict=True)):
        flips = None if signs is None or bool((signs[k] == 1).all()) else signs[k]
        if flips is not None and not group.signs:
            raise FlownError(f"units of '{group.axes[0][0]}' cannot flip their signs")
        for name, axis, inner in group.axes:
            if name not in out:
                raise FlownError(
                    f"tensor '{name}' changes with the units of '{group.axes[0][0]}' and is missing"
                )
            # (n, size, inner, ...): indexing rows moves whole blocks, gathering moves single
            # numbers.
            units = out[name].movedim(axis + 1, 1).unflatten(1, (group.size, inner))
            units = units[torch.arange(len(order), device=order.device)[:, None], order]
            if flips is not None:
                units = units * flips.to(units).reshape(*order.shape, *(1 for _ in units.shape[2:]))
            tensor = units.flatten(1, 2).movedim(1, axis + 1)
            out[name] = tensor
    return out


def groups_of(layout: WeightLayout) -> tuple[Group, ...]:
    """The permutation groups of a layout's network.

    Raises:
        FlownError: a subset of its tensors, or as `symmetry.groups`.
    """
    net = layout.architecture.build().eval()
    if len(layout.names) < len(list(net.parameters())):
        raise FlownError(
            f"{layout.net}: a subset of the network's tensors, whose units "
            "the frozen rest holds in their places; there is nothing to align"
        )
    return symmetry.groups(net, torch.zeros(1, *layout.architecture.input_shape))


@torch.no_grad()
def align(
    batch: WeightBatch,
    reference: Tensor | Literal["mean"] = "mean",
    *,
    groups: Sequence[Group] | None = None,
    rounds: int = 50,
    seed: int = 0,
) -> Aligned:
    """Brings networks into the order of a reference, or of their own mean.

    Args:
        reference: weights (D,). With "mean" the first reference is a network drawn from `seed`, the
            next is the mean of the aligned networks, until no network changes or for `rounds`
            means.
        groups: the network's symmetries; by default they are derived from its graph.

    Raises:
        FlownError: no network, NaN, a reference of another size, or a network without known groups.
    """
    if not len(batch):
        raise FlownError("align: no network given")
    check_finite({"weights": batch.vectors}, "align")
    layout = batch.layout
    if isinstance(reference, Tensor) and tuple(reference.shape) != (layout.size,):
        got = tuple(reference.shape)
        raise FlownError(f"align: expected a reference ({layout.size},), got {got}")
    found = tuple(groups_of(layout) if groups is None else groups)
    matching, taken = _Matching(batch, found), 0
    if isinstance(reference, Tensor):
        target = reference.to(batch.vectors)
        orders = matching.best(target, matching.identity)
    else:
        generator = torch.Generator().manual_seed(seed)
        target = batch.vectors[int(torch.randint(len(batch), (), generator=generator))]
        orders, fresh = matching.best(target, matching.identity), False
        while taken < rounds:
            target, taken = matching.turned(orders).mean(dim=0), taken + 1
            moved = matching.best(target, orders, fresh)
            if _differ(orders, moved):
                orders, fresh = moved, False
            elif fresh:
                break
            else:
                fresh = True  # costs three times as much, so only once the cheap search has ended
    aligned = WeightBatch(layout, matching.turned(orders), batch.provenance)
    permutations, signs = (tuple(order[i] for order in orders) for i in (0, 1))
    return Aligned(aligned, found, permutations, signs, target, taken)


def _differ(before: Orders, after: Orders) -> bool:
    return any(
        not (torch.equal(p, q) and torch.equal(s, t))
        for (p, s), (q, t) in zip(before, after, strict=True)
    )


class _Matching:
    """The search for the orders of n networks, in parts that fit a cache, a part in each thread."""

    def __init__(self, batch: WeightBatch, groups: tuple[Group, ...]) -> None:
        rows = range(0, len(batch), _PART)
        self.parts = [_Part(batch[start : start + _PART], groups) for start in rows]
        self.groups = groups

    @property
    def identity(self) -> Orders:
        return self._joined([part.identity for part in self.parts])

    def turned(self, orders: Orders) -> Tensor:
        """The networks in these orders, (n, D)."""
        matched = zip(self.parts, self._apart(orders), strict=True)
        return torch.cat([part.layout.pack(part.apply(order)) for part, order in matched])

    def best(self, reference: Tensor, orders: Orders, fresh: bool = True) -> Orders:
        """As `_Part.best`, for all networks."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = pool.map(
                lambda part, order: part.best(reference, order, fresh),
                self.parts,
                self._apart(orders),
            )
            return self._joined(list(found))

    def _apart(self, orders: Orders) -> list[Orders]:
        split = [(p.split(_PART), s.split(_PART)) for p, s in orders]
        return [[(p[i], s[i]) for p, s in split] for i in range(len(self.parts))]

    def _joined(self, parts: Sequence[Orders]) -> Orders:
        return [
            (torch.cat([part[k][0] for part in parts]), torch.cat([part[k][1] for part in parts]))
            for k in range(len(self.groups))
        ]


class _Part:
    """The search for the orders of a part of the networks."""

    def __init__(self, batch: WeightBatch, groups: tuple[Group, ...]) -> None:
        self.layout = batch.layout
        self.groups = groups
        self.vectors = batch.vectors
        self.norms = batch.vectors.norm(dim=1)

    @property
    def identity(self) -> Orders:
        n, device = len(self.vectors), self.vectors.device
        return [
            (
                torch.arange(group.size, device=device).repeat(n, 1),
                torch.ones(n, group.size, device=device),
            )
            for group in self.groups
        ]

    def apply(self, orders: Orders) -> dict[str, Tensor]:
        """The networks in these orders, name -> (n, *shape)."""
        permutations, signs = zip(*orders, strict=True) if orders else ((), ())
        return permute(self.layout.unpack(self.vectors), self.groups, permutations, signs)

    def best(self, reference: Tensor, orders: Orders, fresh: bool = True) -> Orders:
        """Orders at least as near to the reference (D,) as the given ones, for every network.

        Without `fresh` the search starts from the given orders alone.
        """
        target = {name: t[0] for name, t in self.layout.unpack(reference[None]).items()}
        # A gain below float32's precision does not count: ties would never end.
        slack = 1e-6 * reference.norm() * self.norms
        best, score = self._ascend(target, orders, slack)
        count = len(self.groups)
        for sequence in (range(count), range(count - 1, -1, -1)) if fresh else ():
            found, reached = self._ascend(target, self._sweep(target, sequence), slack)
            better = reached > score + slack
            score = torch.where(better, reached, score)
            for kept, new in zip(best, found, strict=True):
                kept[0][better], kept[1][better] = new[0][better], new[1][better]
        return best

    def _sweep(self, target: Mapping[str, Tensor], sequence: Sequence[int]) -> Orders:
        """Matches every group once, by the tensors whose other groups are matched already."""
        orders, tensors, known = self.identity, self.layout.unpack(self.vectors), set[int]()
        for k in sequence:
            orders[k] = self._match(k, target, tensors, known)
            tensors = permute(tensors, [self.groups[k]], [orders[k][0]], [orders[k][1]])
            known.add(k)
        return orders

    def _ascend(
        self, target: Mapping[str, Tensor], orders: Orders, slack: Tensor
    ) -> tuple[Orders, Tensor]:
        """Coordinate ascent: the orders where it ends and the agreement there, (n,)."""
        orders, tensors = [(p.clone(), s.clone()) for p, s in orders], self.apply(orders)
        everything = set(range(len(self.groups)))
        active = torch.arange(len(self.vectors), device=self.vectors.device)
        while len(active):
            moved = torch.zeros_like(slack, dtype=torch.bool)
            for k, group in enumerate(self.groups):
                names = sorted({name for name, _, _ in group.axes})
                current = {name: tensors[name][active] for name in names}
                q, t = self._match(k, target, current, everything)
                turned = permute(current, [group], [q], [t])
                # With the group along two axes of one tensor the problem is quadratic, and the
                # linear assignment may lose.
                gain = _agreement(target, turned, names) - _agreement(target, current, names)
                better = gain > slack[active]
                rows = active[better]
                for name in names:
                    tensors[name][rows] = turned[name][better]
                p, s = orders[k]
                p[rows], s[rows] = (
                    p[rows].gather(1, q[better]),
                    s[rows].gather(1, q[better]) * t[better],
                )
                moved[rows] = True
            active = moved.nonzero()[:, 0]
        return orders, _agreement(target, tensors, list(target))

    def _match(
        self, k: int, target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], known: set[int]
    ) -> tuple[Tensor, Tensor]:
        """The best order of one group's units, by the tensors whose other groups are in `known`."""
        from scipy.optimize import linear_sum_assignment  # slow to import, and only this needs it

        group = self.groups[k]
        owners = [(j, axis[:2]) for j, owner in enumerate(self.groups) for axis in owner.axes]
        n, size = len(tensors[group.axes[0][0]]), group.size
        similarity = self.vectors.new_zeros(n, size, size)
        for name, axis, _ in group.axes:
            if any(j not in known for j, place in owners if place[0] == name and place[1] != axis):
                continue
            reference = target[name].movedim(axis, 0).reshape(size, -1)
            units = tensors[name].movedim(axis + 1, 1).reshape(n, size, -1)
            similarity += reference @ units.transpose(1, 2)
        gains = (similarity.abs() if group.signs else similarity).cpu().numpy()
        columns = np.stack([linear_sum_assignment(gain, maximize=True)[1] for gain in gains])
        order = torch.as_tensor(columns, device=similarity.device)
        matched = similarity.gather(2, order[:, :, None])[..., 0]
        flipped = (matched < 0) & group.signs
        return order, torch.where(flipped, -1.0, 1.0)


def _agreement(
    target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], names: Sequence[str]
) -> Tensor:
    """<w_ref, w> over some tensors, (n,)."""
    parts = [
        tensors[name].reshape(len(tensors[name]), -1) @ target[name].flatten() for name in names
    ]
    return torch.stack(parts).sum(dim=0)
