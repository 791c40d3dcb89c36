"""What each kind of work costs: seconds of a core, bytes of memory and of disk, as formulas of the model's shape.

The steps of a run say how much work they are by these formulas (`Step.parts`, `Step.memory`, `Step.room`). The time
left of a run, the estimate before it, and the check of its room follow from them. docs/cost.md shows them, what they
were fitted to, and what they give for models of 1B to 70B.

A second is one of the reference core, on which the library multiplies float16 weights at `PRODUCTS` operations a second
and NumPy float32 matrices at `BLAS`: one core of an EPYC 9004. `ladder.estimate` measures how another machine differs.
"""

from typing import TYPE_CHECKING

from bitladder.evaluate import UNSCORED
from bitladder.ladder.model_shape import Matrix, ModelShape
from bitladder.trial import KEPT_SHARE

if TYPE_CHECKING:
    from bitladder.ladder.steps.step import Extent

PRODUCTS, BLAS = 80e9, 75e9
GRADIENT_PRODUCTS = 98e9  # of torch in bfloat16
GRADIENT_TOKEN, GRADIENT_BESIDE = 4e-4, 1.15  # seconds of any token; and time of all, of that of products and sums
BESIDE = 1.25  # time of a decoded token, of that of its matrix products
# Speed of a quant's products, of that in full precision: of types with super-blocks of 256, and of those of 32, which
# stand in where rows hold no super-blocks.
QUANT, QUANT_32 = 1.7, 0.6
EXPONENTIALS = 2.5e-9  # seconds for each logit of a scored token
SCORED, DECIDING = (
    0.5,
    1 - 1 / UNSCORED,
)  # share of the tokens that is scored: usually, and to decide between models

# Seconds of a loaded model whose weights are swapped: for each weight that is put in; for each input of a swapped
# matrix, which is rounded; and for each such matrix and chunk, because the graph stops there.
SWAPPED, INPUT, NODE = 8e-9, 7e-9, 2e-4

# Seconds of rounding in Q4_K, of feedback and of each pass of `best`: for each weight; for each weight and column; and
# for each weight and row. Then those of the factors of a moment, which all types of a tensor share: for each of its
# numbers; and for each column cubed.
OPEN_WEIGHT, OPEN_COLUMN, OPEN_ROW = 7.5e-8, 1.6e-11, 2.2e-11
PASS_WEIGHT, PASS_COLUMN, PASS_ROW = 1.13e-7, 2.5e-11, 2.6e-11
FACTORS, FACTORS_CUBED = 6.3e-8, 1.8e-11
# Times of a type, of that of Q4_K; types of points search a codebook.
POINTS, OTHERS = 3.5, 1.2
LIBRARY, LIBRARY_IQ = 100e-9, 350e-9  # seconds for each weight that the library quantizes
LIBRARY_SLOW = {"IQ2_XXS": 530e-9, "IQ2_XS": 1e-6, "IQ2_S": 1e-6, "IQ3_XXS": 490e-9}  # IQ2_S is IQ2_XS blocks for most

RANK, SKETCHED = 128, 2048  # of GradientOptions: rank, and the width from which on leverages are estimated
PROCESS = 250 << 20  # bytes of a process with the library
TORCH = 450 << 20  # and of torch
TUNED = 30  # bytes for each weight while scales are tuned


# Seconds.


def decoding(shape: ModelShape, tokens: float, n_ctx: int, logits: float = SCORED) -> float:
    """Of decoding tokens in chunks of `n_ctx`. The share `logits` of them gets logits."""
    products = 2 * (shape.active + logits * shape.head) + 4 * shape.blocks * shape.width * n_ctx
    return tokens * BESIDE * products / PRODUCTS


def scoring(shape: ModelShape, tokens: float) -> float:
    """Of the logits of tokens that are scored."""
    return tokens * shape.vocabulary * EXPONENTIALS


def quant_speed(shape: ModelShape) -> float:
    """How fast a quant decodes, as a multiple of the speed in full precision.

    Example:
        >>> shape = ModelShape(3, (Matrix("a", 10, 256, 1), Matrix("b", 10, 96, 1)), 1, 256, 0, True, 64)
        >>> round(quant_speed(shape), 3)
        1.133
    """
    sizes = [(matrix.count * matrix.share * matrix.rows * matrix.width, matrix.width) for matrix in shape.matrices]
    sizes.append((shape.head, shape.width))
    times = [size / (QUANT if width % 256 == 0 else QUANT_32) for size, width in sizes]
    return sum(size for size, _ in sizes) / sum(times)


def comparing(shape: ModelShape, tokens: float, n_ctx: int, *, quant: bool = False, scored: float = SCORED) -> float:
    """Of decoding tokens by a quant or in full precision, and of comparing a share of them with a base.

    The logits of the base are computed by its head.
    """
    speed = quant_speed(shape) if quant else 1
    head = tokens * scored * 2 * shape.head / BLAS
    return decoding(shape, tokens, n_ctx, scored) / speed + 2 * scoring(shape, tokens * scored) + head


def swapping(shape: ModelShape, recipes: float, tokens: float, n_ctx: int, weights: float) -> float:
    """Of measuring recipes of all matrices on so many tokens in all, where each puts in so many weights."""
    inputs = sum(matrix.count * matrix.share * matrix.width for matrix in shape.matrices) + shape.width
    nodes = sum(matrix.count for matrix in shape.matrices) + 1
    beside = recipes * weights * SWAPPED + tokens * inputs * INPUT + tokens / n_ctx * nodes * NODE
    return comparing(shape, tokens, n_ctx, scored=DECIDING) + beside


def by_library(shape: ModelShape, preset: str) -> float:
    """Of quantizing all weights to a preset by the library's kernels."""
    return shape.weights * LIBRARY_SLOW.get(preset, LIBRARY_IQ if preset.startswith("IQ") else LIBRARY)


def rounding(shape: ModelShape, passes: int, types: float = 1) -> float:
    """Of rounding all matrices in some types, with feedback and so many passes. Factors are made once."""
    heads = Matrix("output", shape.vocabulary, shape.width, 1 if shape.tied else 2)  # and the embeddings
    blocks = sum(matrix.count * round_matrix(matrix, passes, types) for matrix in shape.matrices)
    return blocks + heads.count * round_matrix(heads, passes, types, coupled=False)


def round_matrix(matrix: Matrix, passes: int, types: float = 1, *, coupled: bool = True) -> float:
    """Of rounding one matrix; coupled rows make up for each other's errors."""
    m, n = matrix.rows, matrix.width
    coupling = m if coupled else 0
    opened = OPEN_WEIGHT + OPEN_COLUMN * n + OPEN_ROW * coupling
    each = PASS_WEIGHT + PASS_COLUMN * n + PASS_ROW * coupling
    factors = sum(FACTORS * side**2 + FACTORS_CUBED * side**3 for side in (n, coupling))
    return types * m * n * (opened + passes * each) + factors


def plain_moments(shape: ModelShape, tokens: float, n_ctx: int) -> float:
    """Of second moments in which tokens count alike."""
    sums = 1.2 * sum(matrix.share * matrix.squares for matrix in shape.inputs)
    return decoding(shape, tokens, n_ctx, logits=0) + tokens * sums / BLAS


def weighted_moments(shape: ModelShape, tokens: float) -> float:
    """Of second moments by gradients: forward, back, sums; and inverses that leverages need, once."""
    weights = shape.active + shape.head
    sums = 1.2 * sum(share * size for size, share in shape.gradient_squares) + 8 * RANK * shape.factor_rows
    # Tokens of experts have no leverages.
    inverses = sum(m.count * m.width**3 for m in shape.matrices if m.width <= SKETCHED and m.share == 1)
    token = GRADIENT_TOKEN + GRADIENT_BESIDE * (4 * weights / GRADIENT_PRODUCTS + sums / BLAS)
    return tokens * token + inverses / BLAS


# Bytes.


def moments_bytes(shape: ModelShape, *, gradients: bool) -> float:
    """Of a file of second moments: half a matrix in F16 for each square."""
    if gradients:
        return sum(size for size, _ in shape.gradient_squares) + 2 * RANK * shape.factor_rows
    return sum(matrix.squares for matrix in shape.inputs)


def moments_sums(shape: ModelShape, *, gradients: bool) -> float:
    """Of all sums of second moments, while they grow."""
    if gradients:
        return 2.4 * sum(size for size, _ in shape.gradient_squares) + 8 * RANK * shape.factor_rows
    return 2.2 * sum(matrix.squares for matrix in shape.inputs)


def decoding_bytes(extent: "Extent", logits: int | None = None) -> float:
    """Of a loaded model that is decoded in two contexts (`engine.Lanes`), with so many rows of logits.

    None stands for a measurement: the logits of a chunk in each context, and once more.
    """
    shape = extent.shape
    rows = 3 * extent.chunk if logits is None else logits
    return PROCESS + model_bytes(shape) + 4 * rows * shape.vocabulary + 2 * cache_bytes(extent)


def cache_bytes(extent: "Extent") -> float:
    """Of the keys and values of a chunk, and of buffers of the graph."""
    widest = max(matrix.rows for matrix in extent.shape.matrices)
    return 4 * extent.chunk * (extent.shape.blocks * extent.shape.width + 4 * widest)


def model_bytes(shape: ModelShape) -> float:
    """Of the full-precision model."""
    return 2 * shape.weights if shape.bytes is None else shape.bytes


def gradient_bytes(extent: "Extent") -> float:
    """Of second moments: the model's file is mapped; what the sums and the graph need is kept within a limit.

    As many chunks as there are threads are computed side by side, in a quarter of the limit for one block of each. As
    many blocks as fit keep what their backward pass needs (`calibrate.gradients.segments`).
    """
    shape = extent.shape
    lanes, graph, head = 1, 0.0, 20 * 128 * shape.vocabulary
    fixed = TORCH + 12 * max(matrix.width for matrix in shape.matrices) ** 2
    sums = moments_sums(shape, gradients=extent.gradients)
    if extent.gradients:
        rows = sum(matrix.count * matrix.share * matrix.rows for matrix in shape.matrices)
        graph = 4 * extent.chunk * (3 * rows + 12 * shape.blocks * shape.width)
        lanes = max(1, min(extent.threads, int(extent.limit / 4 / (head + graph / shape.blocks))))
    return PROCESS + model_bytes(shape) + min(extent.limit, sums + fixed + lanes * (head + graph))


def kept_blocks(shape: ModelShape, need: float, limit: int | None) -> float:
    """Of rendered blocks that are kept on the disk."""
    return min(need, KEPT_SHARE * model_bytes(shape) if limit is None else limit)


def rounding_bytes(shape: ModelShape, threads: int) -> float:
    """Of rounding: each thread has a matrix, its second moments and their factors."""
    each = (4 * (6 * m.rows * m.width + 8 * m.width**2 + 4 * m.rows**2) for m in shape.matrices)
    return PROCESS + threads * max(each) + 4 * shape.head


def rounding_threads(shape: ModelShape, threads: int, memory: int) -> int:
    """The most threads, at least one, that round within a memory in which pages of the model's file stay too."""
    fit = threads
    while fit > 1 and rounding_bytes(shape, fit) + model_bytes(shape) / 2 > memory:
        fit -= 1
    return fit
