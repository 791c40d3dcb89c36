"""Rounding of tiles to types with an index for each weight, by torch; see `torch_tiles`.

What is computed is that of `scalar_kernels` and `scalar_refine_kernels`, for all rows of a tile at once.
"""

import numpy as np
import torch
from torch import Tensor

from bitladder.rounding.kernels import LESS as LESS_OF_KERNELS
from bitladder.rounding.matrix import hessians, steps_to_try
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.scalar_kernels import shape_of
from bitladder.rounding.scalar_refine_kernels import ROUNDS, TURNS
from bitladder.rounding.scalar_types import ScalarBlocks, ScalarType
from bitladder.rounding.second_moments import SecondMoments
from bitladder.rounding.torch_tiles import Arrays, BlockParts, Tile, TileOpening, half, wide

LESS = float(LESS_OF_KERNELS)


class ScalarTiles:
    """The kernels of a type with an index for each weight (`torch_tiles.Kernels`).

    Parts are the level of each weight, d, dmin (m), and scale and minimum of sub-blocks.

    Parameters:
        kind: the type.
        options: how to round.
        device: where tensors are.
    """

    cell = 1

    def __init__(self, kind: ScalarType, options: RoundingOptions, device: torch.device) -> None:
        self.units = {"level": 1, "d": kind.block, "m": kind.block, "scale": kind.sub, "minimum": kind.sub}
        self._kind, self._shape, self._sign, self._device = kind, shape_of(kind), float(kind.sign), device
        self._levels = torch.from_numpy(kind.levels).to(device)
        self._middles = torch.from_numpy(self._shape.middles).to(device)
        self._steps = torch.from_numpy(steps_to_try(kind, options)).to(device)
        self._best, self._scale_every = options.method == "best", options.scale_every

    def arrays(self, start: ScalarBlocks) -> Arrays:
        """See `Kernels`."""
        levels = start.type.levels[start.indices]
        return {"level": levels, "d": start.d, "m": start.dmin, "scale": start.scale, "minimum": start.minimum}

    def blocks(self, start: ScalarBlocks, arrays: Arrays) -> ScalarBlocks:
        """See `Kernels`."""
        indices = np.searchsorted(start.type.levels, arrays["level"]).astype(np.uint8)
        d, m = (np.ascontiguousarray(arrays[name], np.float32) for name in ("d", "m"))
        return ScalarBlocks(
            start.type, indices, d, m, *(arrays[name].astype(np.int16) for name in ("scale", "minimum"))
        )

    def local(self, moments: SecondMoments) -> list[tuple[Tensor, ...]]:
        """Of the diagonal blocks of H: Uᵀ [B/sub, sub, sub], D [B/sub, sub] and inverses [B/sub, sub, sub]."""
        parts = hessians(moments, self._kind.sub)
        return [tuple(torch.from_numpy(a).to(self._device) for a in (h.ut, h.d, h.inverse)) for h in parts]

    def nearest(self, x: Tensor) -> Tensor:
        """The level nearest to each number."""
        if self._shape.uniform:
            first = float(self._kind.levels[0])
            return torch.floor(x - (first - 0.5)).clamp(self._shape.lowest, len(self._levels) - 1) + first
        return self._levels[torch.bucketize(x, self._middles)]

    # Feedback

    def open(self, parts: BlockParts, opening: TileOpening) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        cells = parts["level"], parts["d"] * parts["scale"], self._sign * (parts["m"] * parts["minimum"])
        run = self._open_alone if opening.leading is None else self._open_coupled
        return run(*cells, opening)

    def _open_alone(self, level: Tensor, size: Tensor, shift: Tensor, opening: TileOpening) -> tuple[Tensor, Tensor]:
        """Column by column, each to what the errors before it ask for. Level [T, B, R] is overwritten."""
        errors = torch.empty_like(level)
        for j in range(level.shape[1]):
            aim = opening.target[:, j] + opening.carried[:, j]
            if j:
                aim = aim + (opening.ut[:, j : j + 1, :j] @ errors[:, :j])[:, 0]
            level[:, j] = self._rounded(aim, level[:, j], size[:, j], shift[:, j])
            errors[:, j] = opening.target[:, j] - (level[:, j] * size[:, j] + shift[:, j])
        return errors, opening.weights - (level * size + shift)

    def _open_coupled(self, level: Tensor, size: Tensor, shift: Tensor, opening: TileOpening) -> tuple[Tensor, Tensor]:
        """The same where row i aims at w_i + Σ_{k<i} leading_ik delta_k too.

        Column j of row i waits for the columns before it and for the rows above it alone. So the columns t − i of all
        rows i are rounded together, for each t.
        """
        assert opening.leading is not None
        tiles, count, rows = level.shape
        slanted = [slant(part) for part in (level, size, shift, opening.target, opening.carried, opening.weights)]
        # Columns in reverse: those of the rows of a slant are then in the order of the rows.
        ut, leading = opening.ut.flip(1), opening.leading.tril(-1)
        errors, delta = level.new_zeros(tiles, rows, count), level.new_zeros(tiles, count, rows)
        every = torch.arange(rows, device=level.device)
        for t in range(count + rows - 1):
            some = slice(max(0, t - count + 1), min(rows, t + 1))
            turned = slice(count - 1 - t + some.start, count - 1 - t + some.stop)
            now, step, offset, target, carried, weight = (part[:, t, some] for part in slanted)
            target = target + (leading[:, some] * delta[:, turned]).sum(2)
            aim = target + carried + (ut[:, turned] * errors[:, some]).sum(2)
            now.copy_(self._rounded(aim, now, step, offset))
            value = now * step + offset
            errors[:, every[some], t - every[some]] = target - value
            delta[:, count - 1 - t + every[some], every[some]] = weight - value
        level.copy_(upright(slanted[0], count))
        return errors.mT, delta.flip(1)

    def _rounded(self, aim: Tensor, level: Tensor, size: Tensor, shift: Tensor) -> Tensor:
        """The nearest levels; those of blocks without a step stay."""
        return torch.where(size != 0, self.nearest((aim - shift) / size), level)

    # Later passes

    def change(self, turn: int, tile: Tile) -> None:
        """See `Kernels`."""
        if self._best and (turn % self._scale_every == 0 or not len(self._steps)):
            refine = self._refine_plain if len(self._steps) else self._refine_scaled
            for block in range(tile.parts["scale"].shape[1]):
                refine(tile, block)
        if self._best:
            self._refit(tile)
        self._descend(tile)
        if tile.coupled:  # rows that had to wait for others have another turn
            self._descend(tile)

    def _descend(self, tile: Tile) -> None:
        """One pass of coordinate descent on levels. Rows hear of each other after each sub-block."""
        sub, per, parts = self._kind.sub, self._shape.per, tile.parts
        for block in range(parts["scale"].shape[1]):
            columns = slice(block * sub, (block + 1) * sub)
            size = parts["d"][:, block // per] * parts["scale"][:, block]
            shift = self._sign * (parts["m"][:, block // per] * parts["minimum"][:, block])
            h, slope, level = tile.h[:, columns, columns], tile.slope[:, columns].clone(), parts["level"][:, columns]
            new, change = level.clone(), torch.empty_like(slope)
            for j in range(sub):
                own = h[:, j, j, None]
                now = level[:, j] * size + shift
                nearest = self._rounded(now + slope[:, j] / own, level[:, j], size, shift)
                move = nearest * size + shift - now
                better = move * (move * own - 2 * slope[:, j]) < 0
                new[:, j] = torch.where(better, nearest, level[:, j])
                change[:, j] = torch.where(better, move, 0)
                if j + 1 < sub:
                    slope[:, j + 1 :] -= h[:, j + 1 :, j : j + 1] * change[:, j : j + 1]
            tile.take(columns.start, change, [(level, new)])

    def _lanes(self, target: Tensor, ut: Tensor, d: Tensor, size: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds a sub-block by feedback with several steps: target [T, sub, R], size and shift [T, C, R].

        Returns levels [T, sub, C, R], and what their errors cost, [T, C, R].
        """
        tiles, sub, _ = target.shape
        levels = target.new_empty(tiles, sub, *size.shape[1:])
        errors = target.new_empty(tiles, sub, size[0].numel())
        cost, inverse = torch.zeros_like(size), 1 / size
        for j in range(sub):
            own = target[:, j, None] - shift
            aim = own + (ut[:, j : j + 1, :j] @ errors[:, :j]).view(own.shape) if j else own
            levels[:, j] = self.nearest(aim * inverse)
            value = levels[:, j] * size
            cost += (aim - value).square_() * d[:, j, None, None]
            errors[:, j] = (own - value).flatten(1)
        return levels, cost

    def _seen_alone(self, tile: Tile, block: int, size: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        """A sub-block as a problem of its own: values and target [T, sub, R], cost [T, R], and U and D of its H."""
        ut, d, inverse = (part[:, block] for part in tile.local)
        columns = slice(block * self._kind.sub, (block + 1) * self._kind.sub)
        errors = inverse @ tile.slope[:, columns]
        values = tile.parts["level"][:, columns] * size[:, None] + shift[:, None]
        return values, values + errors, ((ut @ errors).square() * d[..., None]).sum(1), ut, d

    def _candidates(self, scale: Tensor, minimum: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales and minimums near a pair, and which of them there are: [T, C, R] each; `set_candidates` in numba."""
        low, high, least, most = (int(limit) for limit in self._shape.limits)
        pairs, signed = [], bool(self._sign)
        for way in range(2 * self._shape.reach + 1):
            near = scale + ((way + 1) // 2 if way % 2 else -(way // 2))
            pairs += [(near, minimum + o) for o in (0, 1, -1)] if signed else [(near, minimum), (-near, minimum)]
        scales, minimums = (torch.stack(each, 1) for each in zip(*pairs, strict=True))
        allowed = (scales >= low) & (scales <= high) & (scales != 0) & (minimums >= least) & (minimums <= most)
        if signed:
            allowed &= (m != 0)[:, None] | (minimums == minimum[:, None])
        return scales, minimums, allowed

    def _refine_scaled(self, tile: Tile, block: int) -> None:
        """Tries other integer scales of a sub-block with new levels, as long as the best lies at the edge."""
        sub, per, parts = self._kind.sub, self._shape.per, tile.parts
        d, m = parts["d"][:, block // per], self._sign * parts["m"][:, block // per]
        views = parts["scale"][:, block], parts["minimum"][:, block], parts["level"][:, block * sub : (block + 1) * sub]
        before, target, best, ut, diagonal = self._seen_alone(tile, block, d * views[0], m * views[1])
        scale, minimum, level = (view.clone() for view in views)
        going = d != 0
        for _ in range(ROUNDS):
            most = int(going.sum(1).max())
            if not most:
                break
            # The rows that go on, and in other matrices as many, whose results are not used.
            rows = going.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            columns = rows[:, None].expand(-1, sub, -1)
            go, was, near, low, d_, m_ = (x.gather(1, rows) for x in (going, best, scale, minimum, d, m))
            scales, minimums, allowed = self._candidates(near, low, m_)
            levels, cost = self._lanes(
                target.gather(2, columns), ut, diagonal, d_[:, None] * scales, m_[:, None] * minimums
            )
            least, lane = torch.where(allowed, cost, torch.inf).min(1)
            better = go & (least < was * LESS)
            best.scatter_(1, rows, torch.where(better, least, was))
            new, new_low = (_at(x, lane) for x in (scales, minimums))
            scale.scatter_(1, rows, torch.where(better, new, near))
            minimum.scatter_(1, rows, torch.where(better, new_low, low))
            level.scatter_(2, columns, torch.where(better[:, None], _levels_at(levels, lane), level.gather(2, columns)))
            edge = ((new.abs() - near.abs()).abs() >= self._shape.reach) | (new_low != low)
            going = torch.zeros_like(going).scatter_(1, rows, better & edge)
        change = level * (d * scale)[:, None] + (m * minimum)[:, None] - before
        news = [
            (view, new)
            for view, new in zip(
                (v if v.dim() == 3 else v[:, None] for v in views),
                (scale[:, None], minimum[:, None], level),
                strict=True,
            )
        ]
        tile.take(block * sub, change, news)

    def _refine_plain(self, tile: Tile, block: int) -> None:
        """Tries other steps of a block that has a d (and m) of its own: rounds, fits d (and m), and rounds again."""
        sub, parts = self._kind.sub, tile.parts
        columns = slice(block * sub, (block + 1) * sub)
        h, d, shift = tile.h[:, columns, columns], parts["d"][:, block], self._sign * parts["m"][:, block]
        before, target, best, ut, diagonal = self._seen_alone(tile, block, d, shift)
        best_d, best_shift, level = d.clone(), shift.clone(), parts["level"][:, columns].clone()
        sizes = half(d[:, None] * self._steps[:, None])
        sizes = torch.where(sizes == 0, d[:, None], sizes)
        shifts = shift[:, None].expand_as(sizes)
        levels = torch.empty(0)
        for turn in range(TURNS):
            if turn:
                sizes, shifts = self._fitted(h, h @ target, levels, sizes, shifts)
            levels, cost = self._lanes(target, ut, diagonal, sizes, shifts)
            least, lane = cost.min(1)
            better = (d != 0) & (least < best * LESS)
            best = torch.where(better, least, best)
            best_d = torch.where(better, _at(sizes, lane), best_d)
            best_shift = torch.where(better, _at(shifts, lane), best_shift)
            level = torch.where(better[:, None], _levels_at(levels, lane), level)
        change = level * best_d[:, None] + best_shift[:, None] - before
        news = {"d": best_d, "m": self._sign * best_shift}
        tile.take(
            columns.start,
            change,
            [
                *((parts[name][:, block : block + 1], new[:, None]) for name, new in news.items()),
                (parts["level"][:, columns], level),
            ],
        )

    def _fitted(
        self, h: Tensor, h_target: Tensor, levels: Tensor, size: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best size (and shift) for levels [T, sub, C, R], rounded to F16; `fit_lanes` in numba."""
        flat = levels.flatten(2)
        aa = ((h @ flat) * flat).sum(1).view(size.shape)
        ta = (h_target[:, :, None] * levels).sum(1)
        if not self._sign:
            new = half(torch.where(aa > 0, ta / aa, size))
            return torch.where(new != 0, new, size), shift
        sums = h.sum(1)
        ab, total, target_total = (
            (sums[:, None] @ flat).view(size.shape),
            sums.sum(1)[:, None, None],
            h_target.sum(1)[:, None],
        )
        determinant = aa * total - ab * ab
        known = determinant > 1e-6 * aa * total
        new = half(torch.where(known, (ta * total - target_total * ab) / determinant, size))
        new_shift = half(torch.where(known, (target_total * aa - ta * ab) / determinant, shift))
        return torch.where(new != 0, new, size), torch.where(new != 0, new_shift, shift)

    def _refit(self, tile: Tile) -> None:
        """Fits d (and m) of each block to its levels and integer scales; `refit` in numba."""
        width, per, parts = self._kind.block, self._shape.per, tile.parts
        for block in range(parts["d"].shape[1]):
            columns, subs = slice(block * width, (block + 1) * width), slice(block * per, (block + 1) * per)
            h, slope = tile.h[:, columns, columns], tile.slope[:, columns]
            d, m = parts["d"][:, block : block + 1], parts["m"][:, block : block + 1]
            a = parts["level"][:, columns] * parts["scale"][:, subs].repeat_interleave(self._kind.sub, 1)
            ha = h @ a
            aa, ga = _dot(a, ha), _dot(a, slope)
            x, y = torch.where(aa > 0, ga / aa, 0), torch.zeros_like(aa)
            ab = bb = gb = y
            b = None
            if self._sign:
                b = self._sign * parts["minimum"][:, subs].repeat_interleave(self._kind.sub, 1)
                hb = h @ b
                ab, bb, gb = _dot(a, hb), _dot(b, hb), _dot(b, slope)
                determinant = aa * bb - ab * ab
                known = determinant > 1e-6 * aa * bb
                x = torch.where(known, (ga * bb - gb * ab) / determinant, x)
                y = torch.where(known, (gb * aa - ga * ab) / determinant, y)
            new_d, new_m = half(d + x.float()), half(m + y.float())
            if self._sign < 0:
                new_m = new_m.clamp(min=0)  # kernels accept a negative number, but no stock file has one
            x, y = new_d.to(x.dtype) - d, new_m.to(x.dtype) - m
            rise = x * x * aa + 2 * x * y * ab + y * y * bb - 2 * (x * ga + y * gb)
            better = rise < -1e-9 * (x * ga + y * gb).abs()
            new_d, new_m = torch.where(better, new_d, d), torch.where(better, new_m, m)
            change = (new_d - d) * a
            if b is not None:
                change = change + (new_m - m) * b
            tile.take(columns.start, change, [(d, new_d), (m, new_m)])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y over columns, [T, 1, R]."""
    return (x * y).sum(1, keepdim=True, dtype=wide(x))


def _at(x: Tensor, lane: Tensor) -> Tensor:
    """x [T, C, R] at the lanes [T, R]."""
    return x.gather(1, lane[:, None])[:, 0]


def _levels_at(levels: Tensor, lane: Tensor) -> Tensor:
    """Levels [T, sub, C, R] at the lanes [T, R]."""
    return levels.gather(2, lane[:, None, None].expand(-1, levels.shape[1], -1, -1))[:, :, 0]


def _slant_index(count: int, rows: int, device: torch.device) -> Tensor:
    """Where row i's column j is in [rows, count + rows] if it is shifted by i."""
    steps = (torch.arange(size, device=device) for size in (rows, count))
    at, column = torch.meshgrid(*steps, indexing="ij")
    return (at * (count + rows + 1) + column).flatten()


def slant(x: Tensor) -> Tensor:
    """x [T, B, R] with row i shifted down by i: [T, B + R, R].

    Example:
        >>> slant(torch.tensor([[[1.0, 2.0]]])).tolist()
        [[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]]
    """
    tiles, count, rows = x.shape
    out = x.new_zeros(tiles, rows * (count + rows))
    out[:, _slant_index(count, rows, x.device)] = x.mT.reshape(tiles, -1)
    return out.view(tiles, rows, count + rows).mT.contiguous()


def upright(x: Tensor, count: int) -> Tensor:
    """`slant` reversed; count: the columns there were."""
    tiles, _, rows = x.shape
    return x.mT.reshape(tiles, -1)[:, _slant_index(count, rows, x.device)].view(tiles, rows, count).mT
