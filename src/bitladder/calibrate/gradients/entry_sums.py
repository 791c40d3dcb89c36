"""The sums that moments by gradients are made of: of outer products of rows, and of an entry.

A matrix of n × n numbers is kept whole, as the upper triangle in panels; or as equal diagonal blocks; or as its
diagonal and its product with a few columns. A leverage says how far a row stands out from such a sum. An entry is one
input, and the outputs of the weights that multiply it.

Factorizations and thin products are computed in one thread: their last bits depend on the number of threads. Those of
products that are added to a panel do not, since their sums are short (one chunk).
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitladder.calibrate.gradients.torch_weights import Routed
from bitladder.calibrate.gradients.usable import torch_threads
from bitladder.calibrate.gradients.weighted_moments import GradientOptions
from bitladder.calibrate.moments.triangles import Correlations, LowRank, triangle
from bitladder.engine import Floats

Array = npt.NDArray[Any]

PANEL = 256  # rows of a whole matrix that are multiplied at once: half of the work of a full product
LEAST = 1e-30  # a mean diagonal below this counts as 0
COLUMNS, ROOTS = "columns", "roots"  # arrays of an entry that are no sums begin or end so


class Gram:
    """Σ w rᵀr over rows r, float32 [blocks, width, width]: numbers of different blocks are not multiplied.

    Parameters:
        width: numbers of a block.
        blocks: blocks of a row.
        device: torch's, on which sums are.
    """

    def __init__(self, width: int, blocks: int = 1, device: torch.device | None = None) -> None:
        self.width, self.blocks = width, blocks
        shapes: list[tuple[int, ...]] = [(min(PANEL, width - at), width - at) for at in range(0, width, PANEL)]
        self.panels = [
            torch.zeros(*shape, device=device) for shape in ([(blocks, width, width)] if blocks > 1 else shapes)
        ]
        self._copies: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds rows [tokens, blocks × width], of which each counts its weight [tokens]."""
        scaled = (rows * weights.sqrt()[:, None]).to(self.panels[0].device)
        if self.blocks == 1:
            for number, panel in enumerate(self.panels):
                at = number * PANEL
                panel.addmm_(scaled[:, at : at + len(panel)].T, scaled[:, at:])
        else:
            parts = scaled.view(len(rows), self.blocks, self.width).transpose(0, 1)
            self.panels[0].baddbmm_(parts.transpose(1, 2), parts)

    def stacked(self) -> torch.Tensor:
        """The blocks, float32 [blocks, width, width], a new tensor of the CPU."""
        if self.blocks > 1:
            return self.panels[0].cpu().clone()
        full = torch.empty(1, self.width, self.width)
        for number, panel in enumerate(self.panels):
            at = number * PANEL
            below = at + len(panel)
            full[0, at:below, at:] = panel
            full[0, below:, at:below] = full[0, at:below, below:].T
        return full

    def packed(self, total: float) -> Floats:
        """The mean: sums divided by `total`; the upper triangles by rows, float32 [blocks, width (width + 1) / 2]."""
        if self.blocks > 1:
            rows, columns = np.triu_indices(self.width)
            return np.asarray(self.panels[0].cpu().numpy()[:, rows, columns] / np.float32(total))
        out, start = np.empty((1, triangle(self.width)), np.float32), 0
        for panel in self.panels:
            for index, row in enumerate(panel.cpu().numpy()):
                stop = start + len(row) - index
                np.divide(row[index:], np.float32(total), out=out[0, start:stop])
                start = stop
        return out

    def clear(self) -> None:
        """Starts again from 0."""
        for panel in self.panels:
            panel.zero_()

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What grows, in memory that is shared; of a device a copy, which `fetch` and `put` keep the same."""
        self._copies = [panel.cpu() for panel in self.panels]
        return {str(number): copy.numpy() for number, copy in enumerate(self._copies)}

    def fetch(self) -> None:
        """Brings the sums from the device to `arrays`. On the CPU they are the same memory."""
        for copy, panel in zip(self._copies, self.panels, strict=True):
            if copy.data_ptr() != panel.data_ptr():
                copy.copy_(panel)

    def put(self) -> None:
        """`fetch` reversed."""
        for copy, panel in zip(self._copies, self.panels, strict=True):
            if copy.data_ptr() != panel.data_ptr():
                panel.copy_(copy)


class LowRankGram:
    """Σ w rᵀr over rows r, of which the diagonal and the product with a few columns are kept.

    With columns Q and Y = (Σ w rᵀr) Q, the sum is near Y (QᵀY)⁻¹ Yᵀ (Nyström), and never less than it. Q is random at
    first. `clear` takes a basis of Y for it, so that the sums that follow are seen where they are large.

    Parameters:
        width: numbers of a row.
        rank: columns.
    """

    def __init__(self, width: int, rank: int) -> None:
        self.width = width
        rank = min(rank, width)
        random = torch.randn(width, rank, generator=torch.Generator().manual_seed(width))
        with torch_threads(1):
            self._columns = torch.linalg.qr(random).Q.contiguous()
        self._products = torch.zeros(width, rank)
        self._diagonal = torch.zeros(width)

    @torch_threads(1)
    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds rows [tokens, width], of which each counts its weight [tokens]."""
        scaled = rows * weights.sqrt()[:, None]
        self._products.addmm_(scaled.T, scaled @ self._columns)
        self._diagonal += scaled.square_().sum(0)

    def stacked(self) -> torch.Tensor:
        """The diagonal, as blocks of one number: float32 [width, 1, 1]."""
        return self._diagonal[:, None, None].clone()

    @torch_threads(1)
    def low_rank(self, total: float) -> LowRank:
        """The mean: sums divided by `total`."""
        core = (self._columns.T @ self._products).double()
        core = (core + core.T) / 2
        # No gradient reaches a weight before a matrix of zeros: the core, and with it every factor, is 0 then.
        size = float(core.diagonal().mean())
        core.diagonal().add_(1e-6 * size if size > 0 else 1.0)
        lower = torch.linalg.cholesky(core)
        factors = torch.linalg.solve_triangular(lower, self._products.double().T, upper=False).T
        return LowRank.of((factors / total**0.5).float().numpy(), (self._diagonal / total).numpy())

    @torch_threads(1)
    def clear(self) -> None:
        """Starts again from 0, with other columns."""
        self._columns.copy_(torch.linalg.qr(self._products).Q)
        self._products.zero_()
        self._diagonal.zero_()

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """What grows, in memory that is shared, and the columns."""
        parts = {COLUMNS: self._columns, "products": self._products, "diagonal": self._diagonal}
        return {name: part.numpy() for name, part in parts.items()}


class Leverage:
    """xᵀ (G + λ)⁻¹ x of rows x, for a Gram matrix G and λ, a share of its mean diagonal.

    With G + λ = L Lᵀ it is ‖L⁻¹x‖². Of a block that is wider than `sketch`, it is estimated by ‖S L⁻¹x‖² for a matrix S
    of `sketch` rows of random signs (Johnson and Lindenstrauss): its mean over S is exact, its relative standard error
    is at most sqrt(2 / sketch), and it costs sketch / width of the operations.

    Parameters:
        width: numbers of a block.
        blocks: blocks of a row.
        sketch: rows of S.
    """

    def __init__(self, width: int, blocks: int, sketch: int) -> None:
        self.roots = torch.zeros(blocks, min(sketch, width), width)

    @torch_threads(1)
    def learn(self, gram: Gram | LowRankGram, damping: float) -> None:
        """Takes G and λ. Until then each leverage is 0."""
        count, width = self.roots.shape[1:]
        signs = torch.eye(width)
        if count < width:
            generator = torch.Generator().manual_seed(width)
            signs = (torch.randint(0, 2, (count, width), generator=generator) * 2 - 1) / count**0.5
        blocks = gram.stacked()
        mean = blocks.diagonal(dim1=1, dim2=2).mean()
        # Where no gradient reaches, G is 0, and squared lengths are as good a measure. Divided by next to nothing they
        # would not be finite.
        mean = torch.where(mean > LEAST, mean, 1.0)
        # As a share of the mean diagonal, leverages do not depend on the unit of the rows.
        blocks.div_(mean).diagonal(dim1=1, dim2=2).add_(damping)
        lower = torch.linalg.cholesky(blocks)
        self.roots.copy_(torch.linalg.solve_triangular(lower, signs, upper=False, left=False)).div_(mean.sqrt())

    @torch_threads(1)
    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The leverages [tokens] of rows [tokens, blocks × width]."""
        blocks, _, width = self.roots.shape
        if blocks == 1:
            return (rows @ self.roots[0].T).square_().sum(1)
        if width == 1:
            return rows.square() @ self.roots[:, 0, 0].square()
        parts = rows.view(len(rows), blocks, width).transpose(0, 1)
        return (parts @ self.roots.transpose(1, 2)).square_().sum((0, 2))


@dataclasses.dataclass(frozen=True)
class OutputShape:
    """How O of a weight is kept: as `blocks` diagonal blocks of `width` numbers, or by a factor of `rank` columns.

    With a factor, leverages are made of the diagonal alone: then the width is 1.
    """

    width: int
    blocks: int
    rank: int = 0

    @property
    def moment_shape(self) -> dict[str, int]:
        """The fields of a MomentShape."""
        n_out = self.width * self.blocks
        return {"n_out": n_out, "rank": min(self.rank, n_out)} if self.rank else {"n_out": n_out, "blocks": self.blocks}

    def sums(self, device: torch.device | None = None) -> Gram | LowRankGram:
        """Sums of this shape, all 0; those of low rank are on the CPU."""
        return LowRankGram(self.blocks, self.rank) if self.rank else Gram(self.width, self.blocks, device)


@dataclasses.dataclass(frozen=True)
class EntryPlan:
    """Weights that share an input and how its tokens are weighted.

    Parameters:
        names: the weights. The entry is kept under the first name.
        n_in: numbers of an input.
        outputs: how O of each weight is kept; None for the head, of experts, and where O is not made.
        experts: matrices of each weight, each with sums of its own; 1 if it is no stack of experts.
    """

    names: tuple[str, ...]
    n_in: int
    outputs: tuple[OutputShape | None, ...]
    experts: int = 1


class EntrySums:
    """The sums of one entry while they grow.

    Sums are float32: at some hundred chunks their rounding, 10⁻⁶ of a diagonal entry, is far below the sampling error.

    Parameters:
        plan: the entry.
        options: how tokens are weighted.
        length: tokens of a chunk.
        device: torch's, on which products of rows are added up.
    """

    def __init__(
        self, plan: EntryPlan, options: GradientOptions, length: int, device: torch.device | None = None
    ) -> None:
        self.plan, self._options = plan, options
        self.inputs = [Gram(plan.n_in, 1, device) for _ in range(plan.experts)]
        self.outputs = [None if shape is None else shape.sums(device) for shape in plan.outputs]
        # Without O all tokens keep counting ‖g‖².
        self.leverages_known = all(gram is not None for gram in self.outputs)
        self._of_inputs = Leverage(plan.n_in, 1, options.sketch) if self.leverages_known else None
        self._of_outputs = [
            None if shape is None else Leverage(shape.width, shape.blocks, options.sketch) for shape in plan.outputs
        ]
        self.learned = False
        self._totals = np.zeros(plan.experts + len(plan.names))  # of w for each expert, and of v for each weight
        self._rows = np.zeros(plan.experts, np.int64)
        self._powers = np.zeros((len(plan.names), length))
        self._waiting: dict[str, torch.Tensor] = {}

    def arrays(self) -> dict[str, Array]:
        """What grows, by name, in memory that is shared."""
        arrays: dict[str, Array] = {"totals": self._totals, "powers": self._powers}
        arrays["rows"] = self._rows
        for place, gram in enumerate([*self.inputs, *self.outputs]):
            if gram is not None:
                arrays |= {f"gram {place} {part}": panel for part, panel in gram.arrays().items()}
        for place, leverage in enumerate([self._of_inputs, *self._of_outputs]):
            if leverage is not None:
                arrays[f"{ROOTS} {place}"] = leverage.roots.numpy()
        return arrays

    def fetch(self) -> None:
        """Brings sums from the device to `arrays`."""
        for gram in (*self.inputs, *self.outputs):
            if isinstance(gram, Gram):
                gram.fetch()

    def put(self) -> None:
        """`fetch` reversed."""
        for gram in (*self.inputs, *self.outputs):
            if isinstance(gram, Gram):
                gram.put()

    def use_leverages(self) -> None:
        """Weights tokens from now on by the leverages that the sums so far give, and starts again from 0."""
        if self._of_inputs is None:
            return
        self._of_inputs.learn(self.inputs[0], self._options.damping)
        self.inputs[0].clear()
        for gram, leverage in zip(self.outputs, self._of_outputs, strict=True):
            assert gram is not None and leverage is not None
            leverage.learn(gram, self._options.damping)
            gram.clear()
        self._totals[:] = 0
        self.learned = True

    def add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor, routed: Routed | None = None) -> None:
        """Adds a sequence of one weight: inputs [rows, n_in], gradients [rows, n_out].

        The input is added up when all of its weights were seen: their weightings are added. Without experts a row is a
        token.
        """
        place = self.plan.names.index(name)
        squares = gradients.square().sum(1)
        self.add_powers(name, inputs, squares, self._weights(place, gradients, squares), routed)
        gram = self.outputs[place]
        if gram is None:
            return
        weights = (
            self._of_inputs.of(inputs) if self.learned and self._of_inputs is not None else torch.ones(len(inputs))
        )
        gram.add(gradients, weights)
        self._totals[self.plan.experts + place] += float(weights.double().numpy().sum())

    def _weights(self, place: int, gradients: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        leverage = self._of_outputs[place]
        return leverage.of(gradients) if self.learned and leverage is not None else squares

    def add_powers(
        self,
        name: str,
        inputs: torch.Tensor,
        squares: torch.Tensor,
        weights: torch.Tensor,
        routed: Routed | None = None,
    ) -> None:
        """Adds what is known of a sequence without the gradients themselves: their squared lengths [rows]."""
        powers = torch.from_numpy(self._powers[self.plan.names.index(name)])
        if routed is None:
            powers += squares.double()
        else:
            powers.index_add_(0, routed.tokens, squares.double())
        self._waiting[name] = weights
        if len(self._waiting) < len(self.plan.names):
            return
        # In the order of the names, whatever the order of the backward pass.
        total = torch.stack([self._waiting[each] for each in self.plan.names]).sum(0)
        self._waiting.clear()
        for expert, rows in [(0, slice(None))] if routed is None else routed.parts():
            self.inputs[expert].add(inputs[rows], total[rows])
            self._totals[expert] += float(total[rows].double().numpy().sum())
            self._rows[expert] += len(total[rows])

    def packed_inputs(self, expert: int = 0) -> Floats:
        """E[w xxᵀ]: the upper triangle by rows, float32 [1, n_in (n_in + 1) / 2]."""
        return self.inputs[expert].packed(self._total(expert))

    def counts(self) -> npt.NDArray[np.int64]:
        """Tokens of each expert, int64 [experts]."""
        return self._rows // self._options.draws

    def kept_outputs(self, name: str) -> Correlations | LowRank | None:
        """E[v ggᵀ] of a weight; None if it is not made."""
        place = self.plan.names.index(name)
        gram, total = self.outputs[place], self._total(self.plan.experts + place)
        if isinstance(gram, LowRankGram):
            return gram.low_rank(total)
        return None if gram is None else Correlations.of(gram.packed(total))

    def by_position(self, name: str) -> Floats:
        """Mean of ‖g‖² at each position, divided by its mean over all, float32 [length]."""
        powers = self._powers[self.plan.names.index(name)]
        return np.asarray(powers / max(float(powers.mean()), np.finfo(np.float64).tiny), np.float32)

    def _total(self, which: int) -> float:
        return max(float(self._totals[which]), float(np.finfo(np.float32).tiny))


def sums_bytes(plan: EntryPlan, sketch: int) -> int:
    """Bytes that EntrySums of a plan take, nearly."""
    if plan.experts > 1:
        return 4 * plan.experts * (plan.n_in + PANEL) * plan.n_in // 2
    numbers = 0
    for shape in (OutputShape(plan.n_in, 1), *(shape for shape in plan.outputs if shape is not None)):
        size = shape.width * shape.blocks
        whole = (size + PANEL) * size / 2 if shape.blocks == 1 else size * shape.width
        numbers += size * min(sketch, shape.width) + (2 * size * shape.rank if shape.rank else int(whole))
    return 4 * numbers
