"""Sums of outer products of rows, and how far a row stands out from such a sum (its leverage).

A matrix of n × n numbers is kept whole, as the upper triangle in panels; or as equal diagonal blocks; or as its
diagonal and its product with a few columns.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from bitladder.calibrate.moments.triangles import LowRank, triangle
from bitladder.engine import Floats

PANEL = 256  # rows of a whole matrix that are multiplied at once: half of the work of a full product
LEAST = 1e-30  # a mean diagonal below this counts as 0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside the context torch computes in one thread.

    The last bits of a factorization depend on the number of threads. Those of products of matrices do not.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Gram:
    """Σ w rᵀr over rows r, float32 [blocks, width, width]: numbers of different blocks are not multiplied.

    Parameters:
        width: numbers of a block.
        blocks: blocks of a row.
    """

    def __init__(self, width: int, blocks: int = 1) -> None:
        self.width, self.blocks = width, blocks
        if blocks > 1:
            self.panels = [torch.zeros(blocks, width, width)]
        else:
            self.panels = [torch.zeros(min(PANEL, width - at), width - at) for at in range(0, width, PANEL)]

    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds rows [tokens, blocks × width], of which each counts its weight [tokens]."""
        scaled = rows * weights.sqrt()[:, None]
        if self.blocks == 1:
            for number, panel in enumerate(self.panels):
                at = number * PANEL
                panel.addmm_(scaled[:, at : at + len(panel)].T, scaled[:, at:])
        else:
            parts = scaled.view(len(rows), self.blocks, self.width).transpose(0, 1)
            self.panels[0].baddbmm_(parts.transpose(1, 2), parts)

    def stacked(self) -> torch.Tensor:
        """The blocks, float32 [blocks, width, width], a new tensor."""
        if self.blocks > 1:
            return self.panels[0].clone()
        full = torch.empty(1, self.width, self.width)
        for number, panel in enumerate(self.panels):
            at = number * PANEL
            below = at + len(panel)
            full[0, at:below, at:] = panel
            full[0, below:, at:below] = panel[:, len(panel) :].T
        return full

    def packed(self, total: float) -> Floats:
        """The mean: sums divided by `total`; the upper triangles by rows, float32 [blocks, width (width + 1) / 2]."""
        if self.blocks > 1:
            rows, columns = np.triu_indices(self.width)
            return np.asarray(self.panels[0].numpy()[:, rows, columns] / np.float32(total))
        out, start = np.empty((1, triangle(self.width)), np.float32), 0
        for panel in self.panels:
            for index, row in enumerate(panel.numpy()):
                stop = start + len(row) - index
                np.divide(row[index:], np.float32(total), out=out[0, start:stop])
                start = stop
        return out

    def clear(self) -> None:
        """Starts again from 0."""
        for panel in self.panels:
            panel.zero_()

    def arrays(self) -> list[npt.NDArray[np.float32]]:
        """What grows, in memory that is shared."""
        return [panel.numpy() for panel in self.panels]


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
        with one_thread():
            self._columns = torch.linalg.qr(random).Q.contiguous()
        self._products = torch.zeros(width, rank)
        self._diagonal = torch.zeros(width)

    def add(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds rows [tokens, width], of which each counts its weight [tokens]."""
        scaled = rows * weights.sqrt()[:, None]
        self._products.addmm_(scaled.T, scaled @ self._columns)
        self._diagonal += scaled.square_().sum(0)

    def stacked(self) -> torch.Tensor:
        """The diagonal, as blocks of one number: float32 [width, 1, 1]."""
        return self._diagonal[:, None, None].clone()

    @one_thread()
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

    @one_thread()
    def clear(self) -> None:
        """Starts again from 0, with other columns."""
        self._columns.copy_(torch.linalg.qr(self._products).Q)
        self._products.zero_()
        self._diagonal.zero_()

    def arrays(self) -> list[npt.NDArray[np.float32]]:
        """What grows, in memory that is shared."""
        return [part.numpy() for part in (self._columns, self._products, self._diagonal)]


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

    @one_thread()
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

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The leverages [tokens] of rows [tokens, blocks × width]."""
        blocks, _, width = self.roots.shape
        if blocks == 1:
            return (rows @ self.roots[0].T).square_().sum(1)
        if width == 1:
            return rows.square() @ self.roots[:, 0, 0].square()
        parts = rows.view(len(rows), blocks, width).transpose(0, 1)
        return (parts @ self.roots.transpose(1, 2)).square_().sum((0, 2))
