"""Rounding by torch: the same blocks as numba's kernels choose, but many rows at once, and several matrices.

All tensors have columns before rows, [matrices, columns, rows]: one column of all rows lies together. Rows and columns
are cut into tiles. A tile is a part of the columns (`column_parts`) of a group of rows: of all, up to `ROWS`, or of
`GROUP`, later of a quarter, where rows make up for each other's errors. What a tile owes to others comes by products of
matrices. A step inside it is made for all its rows, and for one tile of each matrix.

Rows of a group whose errors are coupled cannot change together without more ado: each would make up for an error that
another one has just removed. Changes of all rows are computed side by side, and `Tile.better` takes those that lower f
with the larger gains taken before them.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitladder.rounding.block_types import LARGEST_F16, Blocks, Floats
from bitladder.rounding.matrix import sub_order
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.second_moments import COLUMNS, SecondMoments, column_parts

GROUP = 128  # rows whose errors are coupled, while they are rounded for the first time, as in `method`
SHARE = 4  # groups of later passes, at most: the fewer, the busier is a GPU, and the more have rows to wait for others
ROWS = 8192  # rows whose errors are not
TURNS = 3  # in which rows learn what others change
CANDIDATES = 16  # scales that are tried at once, at most

BlockParts = dict[str, Tensor]
Arrays = Mapping[str, npt.NDArray[Any]]


def half(x: Tensor) -> Tensor:
    """Numbers rounded to F16; beyond its range the largest that F16 has."""
    return x.clamp(-LARGEST_F16, LARGEST_F16).half().float()


def wide(x: Tensor) -> torch.dtype:
    """The type for sums that are subtracted from each other: float64, which Apple's GPUs do not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def cholesky(matrix: npt.NDArray[np.float64], device: torch.device) -> npt.NDArray[np.float64]:
    """The lower factor of a matrix [n, n]. Raises LinAlgError if it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(np.ascontiguousarray(matrix)).to(device))
    if int(failed):
        raise np.linalg.LinAlgError(f"the leading minor of order {int(failed)} is not positive")
    return np.asarray(lower.cpu().numpy())


class Tile:
    """One tile of each of T matrices while its columns change.

    Parameters:
        parts: parts of blocks, [T, columns/unit, R] each.
        delta: weights − blocks, [T, B, R].
        slope: half of −∂f/∂v, [T, B, R].
        h: [T, B, B].
        local: what kernels need of H besides.
        coupling: [T, R, R] as of `second_moments.couplings`, or None.
        own: the diagonal of O, [T, R]; None without coupling.
    """

    def __init__(
        self,
        parts: BlockParts,
        delta: Tensor,
        slope: Tensor,
        h: Tensor,
        local: tuple[Tensor, ...],
        coupling: Tensor | None,
        own: Tensor | None,
    ) -> None:
        self.parts, self.delta, self.slope, self.h, self.local = parts, delta, slope, h, local
        self._coupling, self._own = coupling, own

    @property
    def coupled(self) -> bool:
        """Whether rows make up for the errors of others."""
        return self._coupling is not None

    def seen(self, change: Tensor) -> Tensor:
        """What changes [T, columns, R] are for each row with those of the others."""
        return change if self._coupling is None else change @ self._coupling.mT

    def better(self, change: Tensor, slope: Tensor, h: Tensor) -> Tensor:
        """Which rows change: bool [T, R]. f does not rise by the change of a row and of those before it.

        Parameters:
            change: of some columns, [T, width, R].
            slope: of these, [T, width, R].
            h: of these, [T, width, width].
        """
        moved = h @ change
        rise = (change * (moved - 2 * slope)).sum(1)
        taken = rise < 0
        if self._coupling is None or self._own is None:
            return taken
        gain = rise * self._own
        # Between rows i and k: 2 O_ik/O_ii change_k H change_i, where k has the larger gain.
        between = 2 * (change.mT @ moved) * self._coupling * (gain[:, None, :] < gain[:, :, None])
        last = taken
        for _ in range(TURNS):
            last, taken = taken, rise + (between @ taken[..., None].to(rise.dtype))[..., 0] < 0
        return taken & last

    def take(self, start: int, change: Tensor, news: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Makes the changes of values [T, width, R] from column `start` on, in the rows where that is better.

        Parameters:
            start: the first column.
            change: new values less old ones.
            news: views of parts [T, numbers, R], and what they become.
        """
        columns = slice(start, start + change.shape[1])
        taken = self.better(change, self.slope[:, columns], self.h[:, columns, columns])[:, None]
        for view, new in news:
            view.copy_(torch.where(taken, new, view))
        self.make(start, torch.where(taken, change, 0))

    def make(self, start: int, change: Tensor) -> None:
        """Updates delta and slope after values have changed."""
        columns = slice(start, start + change.shape[1])
        self.delta[:, columns] -= change
        self.slope -= self.h[:, :, columns] @ self.seen(change)


class TileOpening(NamedTuple):
    """Columns of a tile that are rounded for the first time, in the order of rounding.

    weights and target [T, B, R] are what they are and what they should be, carried [T, B, R] what the errors of columns
    before these ask for; ut [T, B, B] and roots [T, B] are Uᵀ and √D of H = U D Uᵀ; leading [T, R, R] is as of
    `second_moments.couplings`, or None.
    """

    weights: Tensor
    target: Tensor
    carried: Tensor
    ut: Tensor
    roots: Tensor
    leading: Tensor | None


class Kernels(Protocol):
    """What a family of types does with a tile."""

    @property
    def units(self) -> Mapping[str, int]:
        """Parts of blocks, and how many columns share a number of each."""

    @property
    def cell(self) -> int:
        """Columns that feedback settles at once."""

    def arrays(self, start: Any) -> Arrays:
        """The parts of blocks, [rows, width/unit] each."""

    def blocks(self, start: Any, arrays: Arrays) -> Blocks:
        """The blocks of parts; `start` is what they were made from."""

    def local(self, moments: SecondMoments) -> list[tuple[Tensor, ...]]:
        """What `change` needs of each part of H besides its diagonal block."""

    def open(self, parts: BlockParts, opening: TileOpening) -> tuple[Tensor, Tensor]:
        """Rounds the cells of a tile for the first time.

        Parameters:
            parts: [T, B/max(unit, cell), R], or [T, B/unit, R] where a unit is smaller than a cell; overwritten.
            opening: what cells aim at.

        Returns:
            Targets less blocks, and weights less blocks, [T, B, R].
        """

    def change(self, turn: int, tile: Tile) -> None:
        """Changes columns where that lowers f; turn: number of the pass."""


Place = tuple[int, slice, slice, int]  # matrix, rows, columns, number of the part of columns


class Stack:
    """Matrices of one shape and type that are rounded side by side.

    Parameters:
        kernels: of their type.
        weights: float32 [rows, n] each.
        values: those of the library's blocks.
        arrays: the parts of these.
        sides: their second moments.
    """

    def __init__(
        self,
        kernels: Kernels,
        weights: Sequence[Floats],
        values: Sequence[Floats],
        arrays: Sequence[Arrays],
        sides: "Sides",
    ) -> None:
        self._kernels, self._sides = kernels, sides
        self._weights = sides.stacked(weights)
        self.parts = {name: sides.stacked([each[name] for each in arrays]) for name in kernels.units}
        self.delta = self._weights - sides.stacked(values)
        rows = self.delta.shape[2]
        sizes = (ROWS, ROWS) if sides.coupling is None else (GROUP, max(GROUP, -(-rows // SHARE)))
        self._waves, self._groups = (
            [slice(first, min(first + size, rows)) for first in range(0, rows, size)] for size in sizes
        )

    def _places(self, wave: bool) -> Iterator[list[Place]]:
        """Tiles that are changed side by side, all of one shape.

        In a wave these are of several groups: with coupling, a tile waits for those above it and to its left alone.
        """
        columns = list(enumerate(column_parts(self.delta.shape[1])))
        matrices = range(len(self.delta))
        if not wave:
            for rows, (number, part) in itertools.product(self._groups, columns):
                yield [(matrix, rows, part, number) for matrix in matrices]
            return
        for turn in range(len(self._waves) + len(columns) - 1):
            same: dict[tuple[int, int], list[Place]] = {}
            for number, part in columns:
                if 0 <= turn - number < len(self._waves):
                    rows = self._waves[turn - number]
                    places = same.setdefault((rows.stop - rows.start, part.stop - part.start), [])
                    places += [(matrix, rows, part, number) for matrix in matrices]
            yield from same.values()

    def open(self) -> None:
        """Rounds all columns for the first time; see `method.open_groups`."""
        sides, leading, cell, units = self._sides, self._sides.leading, self._kernels.cell, self._kernels.units
        targets, carried = self._weights.clone(), torch.zeros_like(self._weights)
        for places in self._places(wave=leading is not None):
            orders = [sides.orders[matrix][part] for matrix, _, part, _ in places]
            # Which numbers of each part of blocks belong to the tile.
            at = {name: [order[:: min(unit, cell)] // unit for order in orders] for name, unit in units.items()}
            parts = {name: _rows_at(self.parts[name], places, at[name]) for name in units}
            opening = TileOpening(
                _rows_at(self._weights, places, orders),
                _rows_at(targets, places, orders),
                torch.stack([carried[x, part, rows] for x, rows, part, _ in places]),
                torch.stack([sides.ut[x, part, part] for x, _, part, _ in places]),
                torch.stack([sides.roots[x, part] for x, _, part, _ in places]),
                None if leading is None else torch.stack([leading[x, rows, rows] for x, rows, _, _ in places]),
            )
            errors, delta = self._kernels.open(parts, opening)
            for t, ((x, rows, part, _), order) in enumerate(zip(places, orders, strict=True)):
                for name, new in parts.items():
                    self.parts[name][x, :, rows][at[name][t]] = new[t]
                self.delta[x, :, rows][order] = delta[t]
                carried[x, part.stop :, rows] += sides.ut[x, part.stop :, part] @ errors[t]
                if leading is not None:
                    targets[x, :, rows.stop :][order] += delta[t] @ leading[x, rows.stop :, rows].T

    def change(self, turn: int, going: Tensor) -> tuple[Tensor, Tensor]:
        """Changes all columns once more; see `method.change_groups`.

        Parameters:
            turn: number of the pass.
            going: which matrices may change, bool [X].

        Returns:
            By how much the damped loss of each matrix fell, and about how large it was, [X].
        """
        sides = self._sides
        # What each row sees of its own errors and of those of others.
        seen = self.delta if sides.coupling is None else self.delta @ sides.coupling.mT
        fall = torch.zeros(len(seen), dtype=wide(seen), device=seen.device)
        level = torch.zeros_like(fall)
        for places in self._places(wave=False):
            _, rows, part, number = places[0]
            before = self.delta[:, part, rows]
            parts = {
                name: self.parts[name][:, part.start // unit : part.stop // unit, rows].clone()
                for name, unit in self._kernels.units.items()
            }
            coupling = None if sides.coupling is None else sides.coupling[:, rows, rows]
            own = None if sides.own is None else sides.own[:, rows]
            slope = sides.h[:, part] @ seen[:, :, rows]
            tile = Tile(
                parts, before.clone(), slope.clone(), sides.h[:, part, part], sides.local[number], coupling, own
            )
            self._kernels.change(turn, tile)
            moved = tile.delta - before
            counts = 1 if own is None else own[:, None]
            rise = (counts * (2 * slope + tile.h @ tile.seen(moved)) * moved).sum((1, 2), dtype=wide(seen))
            # Where rows were still learning from each other, f may have risen.
            kept = ((rise < 0) & going)[:, None, None]
            level += (counts * slope * before).sum((1, 2), dtype=wide(seen))
            fall -= rise.clamp(max=0)
            for name, unit in self._kernels.units.items():
                view = self.parts[name][:, part.start // unit : part.stop // unit, rows]
                view.copy_(torch.where(kept, parts[name], view))
            moved = torch.where(kept, moved, 0)
            if sides.coupling is not None:
                seen[:, part] += moved @ sides.coupling[:, :, rows].mT
            before += moved
        return fall, level


def _rows_at(whole: Tensor, places: Sequence[Place], columns: Sequence[Tensor]) -> Tensor:
    """Of [X, columns, rows], the rows of each place at its columns, [T, columns, R]."""
    return torch.stack([whole[x, :, rows][at] for (x, rows, _, _), at in zip(places, columns, strict=True)])


class Sides:
    """Second moments of matrices of one shape, on the device: [X, …], a matrix each.

    Parameters:
        moments: those of each matrix.
        kernels: of the type.
        options: how to round.
        device: torch's.
    """

    def __init__(
        self, moments: Sequence[SecondMoments], kernels: Kernels, options: RoundingOptions, device: torch.device
    ) -> None:
        self._device = device

        def on_device(arrays: Sequence[npt.NDArray[np.generic]]) -> Tensor:
            return torch.stack([torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in arrays])

        self.h = on_device([each.h for each in moments])
        cells = [sub_order(each.h, kernels.cell, options.by_importance) for each in moments]
        orders = [(each[:, None] * kernels.cell + np.arange(kernels.cell)).reshape(-1) for each in cells]
        factors = [each.factor(order) for each, order in zip(moments, orders, strict=True)]
        self.ut, self.roots = on_device([ut for ut, _ in factors]), on_device([np.sqrt(d) for _, d in factors])
        self.orders = on_device(orders)
        self.leading = self.coupling = self.own = None
        if len(moments[0].leading):
            self.leading = on_device([each.leading for each in moments])
            self.coupling = on_device([each.coupling for each in moments])
            self.own = on_device([each.row_weights for each in moments])
        each_local = zip(*(kernels.local(each) for each in moments), strict=True)
        self.local = [tuple(map(torch.stack, zip(*part, strict=True))) for part in each_local]

    def stacked(self, arrays: Sequence[npt.NDArray[np.generic]]) -> Tensor:
        """Arrays [rows, columns] as float32 [X, columns, rows] on the device."""
        moved = [torch.from_numpy(np.ascontiguousarray(each)).to(self._device).float().T for each in arrays]
        return torch.stack(moved).contiguous()


def round_stack(
    kernels: Kernels,
    weights: Sequence[Floats],
    starts: Sequence[Blocks],
    moments: Sequence[SecondMoments],
    options: RoundingOptions,
    device: torch.device,
) -> list[Blocks]:
    """Blocks of matrices of one shape and type; parameters as of `method.round_blocks`, but for each of them.

    Parameters:
        kernels: of their type.
        device: where to compute.
    """
    sides = Sides(moments, kernels, options, device)
    values, arrays = [start.values() for start in starts], [kernels.arrays(start) for start in starts]
    rows = len(weights[0])
    step = ROWS if sides.coupling is None else rows
    done: list[BlockParts] = []
    for first in range(0, rows, step):
        some = slice(first, first + step)
        stack = Stack(
            kernels,
            [each[some] for each in weights],
            [each[some] for each in values],
            [{name: part[some] for name, part in each.items()} for each in arrays],
            sides,
        )
        stack.open()
        going = torch.ones(len(weights), dtype=torch.bool, device=device)
        for turn in range(0 if options.method == "feedback" else options.passes):
            gain, level = stack.change(turn, going)
            going &= gain >= options.enough * level
            if not going.any():
                break
        done.append({name: part.mT.cpu() for name, part in stack.parts.items()})
    whole = {name: torch.cat([each[name] for each in done], 1).numpy() for name in kernels.units}
    return [
        kernels.blocks(start, {name: part[index] for name, part in whole.items()}) for index, start in enumerate(starts)
    ]


def bytes_of(rows: int, width: int, coupled: bool) -> int:
    """About the bytes that `round_stack` takes for one matrix on the device.

    Weights, delta, targets, what is carried or seen, and the parts of blocks; H and its factor; O twice; and the
    candidates of a tile.
    """
    at_once = rows if coupled else min(rows, ROWS)
    tile = (max(GROUP, -(-rows // SHARE)) if coupled else at_once) * COLUMNS
    return 4 * (7 * at_once * width + 2 * width**2 + (2 * rows**2 if coupled else 0) + 2 * CANDIDATES * tile)
