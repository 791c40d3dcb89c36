"""Rounding of tiles to points of a grid, by torch; see `torch_tiles`.

What is computed is that of `vector_kernels` and `point_kernels`, for all rows of a tile at once. |r − T v|² of a signed
point v is linear in v_i and v_i v_k, so that the costs of all points are one product of matrices.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from bitladder.rounding.kernels import LESS as LESS_OF_KERNELS
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.point_kernels import AMBIGUOUS
from bitladder.rounding.second_moments import SecondMoments, column_parts
from bitladder.rounding.torch_tiles import Arrays, BlockParts, Tile, TileOpening, half, wide
from bitladder.rounding.vector_types import BLOCK, VectorBlocks, VectorType

LESS = float(LESS_OF_KERNELS)
COSTS = 1 << 24  # of points that are held at once


class PointTiles:
    """The kernels of a type that stores points (`torch_tiles.Kernels`).

    Parts are the code of each group, the signed point (value) of each weight, d, and the scale of sub-blocks.

    Parameters:
        kind: the type.
        options: how to round.
        device: where tensors are.
    """

    def __init__(self, kind: VectorType, options: RoundingOptions, device: torch.device) -> None:
        self.units = {"code": kind.group, "value": 1, "d": BLOCK, "scale": kind.sub}
        self.cell = kind.sub
        self._kind, self._device = kind, device
        self._grid = torch.tensor(kind.grid, device=device)  # [K, group]
        self._multipliers = torch.from_numpy(kind.multipliers).to(device)
        self._hold = float((options.hold_even if kind.even else options.hold) * kind.grid.min())
        self._best, self._scale_every = options.method == "best", options.scale_every
        self._moves = options.scale_moves if self._best else 0
        first, second = torch.triu_indices(kind.group, kind.group, device=device)
        self._pairs = first, second
        self._twice = torch.where(first == second, 1.0, 2.0)
        products = self._grid[:, first] * self._grid[:, second]
        self._features = torch.cat([self._grid, products], 1).T.contiguous()  # [features, K]
        tried = min(AMBIGUOUS, kind.group)
        self._patterns = torch.arange(1 << tried, device=device)
        self._flips = ((self._patterns[:, None] >> torch.arange(tried, device=device)) & 1).bool()

    def arrays(self, start: VectorBlocks) -> Arrays:
        """See `Kernels`."""
        return {"code": start.codes.astype(np.int32), "value": start.signed(), "d": start.d, "scale": start.scale}

    def blocks(self, start: VectorBlocks, arrays: Arrays) -> VectorBlocks:
        """See `Kernels`."""
        codes, minus = arrays["code"].astype(np.uint16), (arrays["value"] < 0).astype(np.uint8)
        d = np.ascontiguousarray(arrays["d"], np.float32)
        return VectorBlocks(start.type, np.ascontiguousarray(codes), minus, d, arrays["scale"].astype(np.int16))

    def local(self, moments: SecondMoments) -> list[tuple[Tensor, ...]]:
        """T with TᵀT = H_b and the inverses of H's diagonal blocks, of units and of sub-blocks."""
        both = [moments.local(width) for width in (self._kind.unit, self._kind.sub)]
        parts = [[each.part(part.start, part.stop) for each in both] for part in column_parts(len(moments.h))]
        return [
            tuple(torch.from_numpy(a).to(self._device) for each in part for a in (each.triangles, each.inverse))
            for part in parts
        ]

    def _sizes(self, d: Tensor, scale: Tensor) -> Tensor:
        """What points are multiplied by."""
        return d * self._multipliers[scale.long()]

    # The search of a grid

    def _search(self, r: Tensor, t: Tensor, parity: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The best points and signs of one group of each row: r [T, group, R], t [T, group, group].

        Parameters:
            parity: of the number of minuses, or None for any.

        Returns:
            Indices [T, R], costs [T, R] and values [T, group, R].
        """
        group = r.shape[1]
        aims = torch.linalg.solve_triangular(t, r, upper=False)
        signs = torch.where(aims < 0, -1.0, 1.0)
        size, near = aims.abs().sort(dim=1)
        tried = self._flips.shape[1]
        count = (size[:, :tried] < self._hold).sum(1)
        if parity is not None:
            count = count.clamp(min=2)  # a fixed parity needs a column or two that can give way
        fits = self._patterns[:, None] < (1 << count)[:, None]  # [T, patterns, R]
        if parity is not None:
            minuses = (aims < 0).sum(1)[:, None] + self._flips.sum(1)[:, None]
            fits &= minuses % 2 == parity
        tile, pattern, row = fits.nonzero(as_tuple=True)
        flipped = torch.zeros(len(tile), group, dtype=torch.bool, device=r.device)
        flipped.scatter_(1, near[tile, :tried, row], self._flips[pattern])
        s = signs[tile, :, row]
        s = torch.where(flipped, -s, s)
        linear, square = t.mT @ r, t.mT @ t
        first, second = self._pairs
        products = (square[:, first, second] * self._twice)[tile]
        coefficients = torch.cat([-2 * linear[tile, :, row] * s, products * (s[:, first] * s[:, second])], 1)
        step = max(1, COSTS // len(self._grid))
        least = [(coefficients[at : at + step] @ self._features).min(1) for at in range(0, len(tile), step)]
        costs = r.new_full(fits.shape, torch.inf)
        costs[tile, pattern, row] = torch.cat([each.values for each in least])
        points = torch.zeros(fits.shape, dtype=torch.long, device=r.device)
        points[tile, pattern, row] = torch.cat([each.indices for each in least])
        which = torch.zeros_like(points)
        which[tile, pattern, row] = torch.arange(len(tile), device=r.device)
        best = costs.argmin(1)[:, None]
        index = points.gather(1, best)[:, 0]
        values = (s[which.gather(1, best)[:, 0]] * self._grid[index]).mT
        return index, (r - t @ values).square().sum(1), values

    def _choose(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best points of a unit: r [T, unit, R], t [T, unit, unit]; codes [T, unit/group, R], costs, values."""
        group, even = self._kind.group, self._kind.even
        if r.shape[1] == group:
            index, cost, values = self._search(r, t, 0 if even else None)
            return index[:, None], cost, values
        both = []
        for parity in range(2):  # two groups share it
            first, cost, values = self._search(r[:, :group], t[:, :group, :group], parity)
            rest = r[:, group:] - t[:, group:, :group] @ values
            second, more, others = self._search(rest, t[:, group:, group:], parity)
            both.append((torch.stack([first, second], 1), cost + more, torch.cat([values, others], 1)))
        better = both[1][1] < both[0][1]
        codes, values = (torch.where(better[:, None], both[1][k], both[0][k]) for k in (0, 2))
        return codes, torch.minimum(both[0][1], both[1][1]), values

    def _choose_block(self, aims: Tensor, t: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The points of a sub-block, unit by unit: aims [T, sub, R] = T · weights; codes, costs and values."""
        unit, values, codes = self._kind.unit, torch.zeros_like(aims), []
        total = torch.zeros_like(size)
        for at in range(0, aims.shape[1], unit):
            some = slice(at, at + unit)
            r = aims[:, some] / size[:, None] - t[:, some, :at] @ values[:, :at]
            code, cost, values[:, some] = self._choose(r, t[:, some, some])
            codes.append(code)
            total += size * size * cost
        return torch.cat(codes, 1), total, values

    def _choose_scale(
        self, aims: Tensor, t: Tensor, d: Tensor, start: Tensor, best: Tensor, code: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The points of a sub-block with the scale given, and with those next to it as long as that helps.

        Parameters:
            aims: T · what weights should be, [T, sub, R].
            t: [T, sub, sub].
            d: of the blocks, [T, R].
            start: scales, [T, R].
            best: what code [T, sub/group, R] and value [T, sub, R] cost, [T, R].

        Returns:
            Scales, codes and values.
        """
        scale, code, value, best = start.clone(), code.float(), value.clone(), best.clone()
        code = code.clone()

        def tried(going: Tensor, s: Tensor) -> Tensor:
            """Tries scales in some rows; returns where that is better."""
            most = int(going.sum(1).max())
            if not most:
                return going
            rows = going.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            go, was, new = (x.gather(1, rows) for x in (going, best, s))
            size = self._sizes(d.gather(1, rows), new.clamp(0, len(self._multipliers) - 1))
            size = torch.where(go, size, 1)
            codes, cost, values = self._choose_block(aims.gather(2, _over(rows, aims)), t, size)
            better = go & (cost < was * LESS)
            best.scatter_(1, rows, torch.where(better, cost, was))
            scale.scatter_(1, rows, torch.where(better, new, scale.gather(1, rows)))
            for whole, part in ((code, codes.float()), (value, values)):
                at = _over(rows, whole)
                whole.scatter_(2, at, torch.where(better[:, None], part, whole.gather(2, at)))
            return torch.zeros_like(going).scatter_(1, rows, better)

        tried(d != 0, start)
        for way in (-1, 1):
            going, s = (d != 0) & (scale >= start), start
            for _ in range(self._moves):
                s = s + way
                going = tried(going & (s >= 0) & (s < len(self._multipliers)), s)
        return scale, code, value

    # Feedback

    def open(self, parts: BlockParts, opening: TileOpening) -> tuple[Tensor, Tensor]:
        """See `Kernels`.

        Without coupling sub-blocks are rounded one after the other, for all rows at once. With it sub-block j of row i
        waits for those before it and for the rows above, so that the sub-blocks t − i of all rows i are rounded
        together, for each t: each is a tile of one row then, for its H is another.
        """
        sub, count, rows = self._kind.sub, parts["scale"].shape[1], opening.target.shape[2]
        tiles = len(opening.target)
        # [T, sub-blocks, numbers of one, …]
        code, value, target, carried, weights = (
            part.view(tiles, count, -1, rows)
            for part in (parts["code"], parts["value"], opening.target, opening.carried, opening.weights)
        )
        ut, roots = opening.ut.view(tiles, count, sub, -1), opening.roots.view(tiles, count, sub, 1)
        errors, delta = torch.zeros_like(target), torch.zeros_like(target)
        flat = errors.view(tiles, count * sub, rows)
        every = torch.arange(rows, device=flat.device)
        leading = None if opening.leading is None else opening.leading.tril(-1)
        for t in range(count if leading is None else count + rows - 1):
            if leading is None:
                at, some = torch.full((1,), t, device=flat.device), every[None]  # one tile of all rows
            else:
                some = every[max(0, t - count + 1) : min(rows, t + 1), None]  # tiles of one row each
                at = t - some[:, 0]
            cut = functools.partial(_cells, numbers=at[:, None], rows=some)
            aim = cut(target)
            if leading is not None:
                aim = aim + (delta[:, at] @ leading[:, some[:, 0], :, None]).flatten(0, 1)
            pulled = (ut[:, at] @ flat[:, :, some].permute(0, 2, 1, 3)).flatten(0, 1) + cut(carried)
            own = torch.stack([ut[:, j, :, j * sub : (j + 1) * sub] for j in at.tolist()], 1).flatten(0, 1)
            root = roots[:, at].flatten(0, 1)
            d, scale = (cut(parts[name][:, :, None])[:, 0] for name in ("d", "scale"))
            worst = torch.full_like(d, torch.inf)
            new = self._choose_scale(root * (pulled + own @ aim), root * own, d, scale, worst, cut(code), cut(value))
            values = new[2] * self._sizes(d, new[0])[:, None]
            for whole, part in (
                (parts["scale"][:, :, None], new[0][:, None]),
                (code, new[1]),
                (value, new[2]),
                (errors, aim - values),
                (delta, cut(weights) - values),
            ):
                whole.transpose(2, 3)[:, at[:, None], some] = part.view(tiles, len(at), *part.shape[1:]).mT
        return flat, delta.view_as(flat)

    # Later passes

    def change(self, turn: int, tile: Tile) -> None:
        """See `Kernels`."""
        if self._best and turn % self._scale_every == 0:
            self._refine(tile)
        if self._best:
            self._refit(tile)
        self._descend(tile)

    def _descend(self, tile: Tile) -> None:
        """Chooses each unit again, all others as they are."""
        unit, group, sub, parts = self._kind.unit, self._kind.group, self._kind.sub, tile.parts
        for number in range(tile.delta.shape[1] // unit):
            at = number * unit
            columns, codes = slice(at, at + unit), slice(at // group, (at + unit) // group)
            t, inverse = (part[:, number] for part in tile.local[:2])
            size = self._sizes(parts["d"][:, at // BLOCK], parts["scale"][:, at // sub])
            known = (size != 0)[:, None]
            value, safe = parts["value"][:, columns], torch.where(known, size[:, None], 1)
            move = inverse @ tile.slope[:, columns] / safe
            code, cost, new = self._choose(t @ (move + value), t)
            better = known & (cost < (t @ move).square().sum(1) * LESS)[:, None]
            change = torch.where(better, new * size[:, None] - value * size[:, None], 0)
            tile.take(at, change, [(parts["code"][:, codes], code.float()), (value, new)])

    def _refine(self, tile: Tile) -> None:
        """Tries other scales of each sub-block, with new points."""
        sub, group, parts = self._kind.sub, self._kind.group, tile.parts
        for number in range(parts["scale"].shape[1]):
            at = number * sub
            columns, codes = slice(at, at + sub), slice(at // group, (at + sub) // group)
            t, inverse = (part[:, number] for part in tile.local[2:])
            d, scale = parts["d"][:, at // BLOCK], parts["scale"][:, number]
            code, value = parts["code"][:, codes], parts["value"][:, columns]
            before = value * self._sizes(d, scale)[:, None]
            move = inverse @ tile.slope[:, columns]
            now = (t @ move).square().sum(1)
            new = self._choose_scale(t @ (move + before), t, d, scale, now, code, value)
            change = new[2] * self._sizes(d, new[0])[:, None] - before
            tile.take(at, change, [(scale[:, None], new[0][:, None]), (code, new[1]), (value, new[2])])

    def _refit(self, tile: Tile) -> None:
        """Fits d of each block to its points and scales."""
        sub, parts = self._kind.sub, tile.parts
        for block in range(parts["d"].shape[1]):
            columns, subs = (
                slice(block * BLOCK, (block + 1) * BLOCK),
                slice(block * BLOCK // sub, (block + 1) * BLOCK // sub),
            )
            a = parts["value"][:, columns] * self._multipliers[parts["scale"][:, subs].long()].repeat_interleave(sub, 1)
            kind = wide(a)
            aa = (a * (tile.h[:, columns, columns] @ a)).sum(1, keepdim=True, dtype=kind)
            ga = (a * tile.slope[:, columns]).sum(1, keepdim=True, dtype=kind)
            d = parts["d"][:, block : block + 1]
            new = half(d + torch.where(aa > 0, ga / aa, 0).float())
            x = new.to(kind) - d
            better = (new != 0) & (x * (x * aa - 2 * ga) < -1e-9 * (x * ga).abs())
            new = torch.where(better, new, d)
            tile.take(columns.start, (new - d) * a, [(d, new)])


def _cells(whole: Tensor, numbers: Tensor, rows: Tensor) -> Tensor:
    """Of [T, sub-blocks, …, R], sub-blocks [cells, 1] of rows [cells, R'], as tiles [T · cells, …, R']."""
    return whole.transpose(2, 3)[:, numbers, rows].mT.flatten(0, 1)


def _over(rows: Tensor, whole: Tensor) -> Tensor:
    """Rows [T, N] as an index for each column of a tensor [T, columns, R]."""
    return rows[:, None].expand(-1, whole.shape[1], -1)
