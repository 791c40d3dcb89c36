"""Vectors of sixteen float32 numbers for numba's kernels, and feedback within a sub-block, a lane for each step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from bitladder.rounding.kernels import jit

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Vector16")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


_VECTOR_TYPE = _Vector()


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Where sixteen numbers of a flat array begin."""
    data = context.make_array(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [at]), ir.PointerType(_VECTOR))


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """The numbers of a flat array from `at` on."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = context.cast(builder, values[1], signature.args[1], types.intp)
        return builder.load(_place(context, builder, signature.args[0], values[0], at), align=4)

    return _VECTOR_TYPE(array, at), code


@intrinsic
def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    """Writes the numbers into a flat array from `at` on."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = context.cast(builder, values[1], signature.args[1], types.intp)
        builder.store(values[2], _place(context, builder, signature.args[0], values[0], at), align=4)
        return context.get_dummy_value()

    return types.void(array, at, vector), code


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """A number in every lane."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = context.cast(builder, values[0], signature.args[0], types.float32)
        vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        return builder.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return _VECTOR_TYPE(number), code


def _operation(count: int, emit: Callable[..., Any], doc: str) -> Any:
    """An operation on each lane of `count` vectors."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return emit(builder, *values)

    def unary(typing: Any, first: Any) -> Any:
        return _VECTOR_TYPE(first), code

    def binary(typing: Any, first: Any, second: Any) -> Any:
        return _VECTOR_TYPE(first, second), code

    def ternary(typing: Any, first: Any, second: Any, third: Any) -> Any:
        return _VECTOR_TYPE(first, second, third), code

    function = (unary, binary, ternary)[count - 1]
    function.__doc__ = doc
    return intrinsic(function)


def _library(name: str) -> Callable[..., Any]:
    def emit(builder: Any, *values: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(values))
        module = builder.module
        full = f"llvm.{name}.v{LANES}f32"
        function = module.globals.get(full) or ir.Function(module, kind, full)
        return builder.call(function, values)

    return emit


def _greater(builder: Any, first: Any, second: Any, then: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", first, second), then, other)


def _eleven_bits(builder: Any, x: Any) -> Any:
    numbers = ir.VectorType(ir.IntType(32), LANES)

    def every(number: int) -> Any:
        return ir.Constant(numbers, [number] * LANES)

    bits = builder.bitcast(x, numbers)
    odd = builder.and_(builder.lshr(bits, every(13)), every(1))
    raised = builder.add(builder.add(bits, every(0xFFF)), odd)
    return builder.bitcast(builder.and_(raised, every(0xFFFFE000)), _VECTOR)


subtract = _operation(2, lambda builder, x, y: builder.fsub(x, y), "x − y")
multiply = _operation(2, lambda builder, x, y: builder.fmul(x, y), "x y")
multiply_add = _operation(3, _library("fmuladd"), "x y + z")
floor = _operation(1, _library("floor"), "The greatest integer not above x.")
integer = _operation(1, _library("rint"), "The integer nearest to x.")
eleven_bits = _operation(1, _eleven_bits, "The number nearest to x of eleven significant bits, as F16 has.")
larger = _operation(2, lambda builder, x, y: _greater(builder, x, y, x, y), "The larger of x and y; y where x is NaN.")
smaller = _operation(2, lambda builder, x, y: _greater(builder, y, x, x, y), "The smaller of x and y.")
add_where_greater = _operation(
    3, lambda builder, x, y, z: _greater(builder, x, y, z, ir.Constant(_VECTOR, None)), "z where x > y, else 0."
)


class ScaleLanes(NamedTuple):
    """What is tried, a lane for each, and what comes of it: [LANES] each, `level` and `rest` [sub · LANES].

    `scale` and `minimum` are the integers of size and shift; `level` is the level of each column, `cost` what errors
    cost; `square`, `with_target` and `with_ones` are products of levels in H_b. `rest` is scratch.
    """

    scale: npt.NDArray[np.int64]
    minimum: npt.NDArray[np.int64]
    size: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    cost: npt.NDArray[np.float32]
    square: npt.NDArray[np.float32]
    with_target: npt.NDArray[np.float32]
    with_ones: npt.NDArray[np.float32]
    level: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]


@jit
def new_lanes(sub):
    """Lanes for sub-blocks of `sub` columns."""
    return ScaleLanes(
        np.ones(LANES, np.int64),
        np.zeros(LANES, np.int64),
        np.ones(LANES, np.float32),
        np.zeros(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(sub * LANES, np.float32),
        np.empty(sub * LANES, np.float32),
    )


@jit
def round_lanes(target, ut, d, shape, lanes):
    """Rounds target [sub] in every lane by feedback with ut [sub, sub] and d [sub]; writes level and cost."""
    rest, level = lanes.rest, lanes.level
    levels, middles = shape.levels, shape.middles
    for lane in range(LANES):
        lanes.cost[lane] = np.float32(1) / lanes.size[lane]
    inverse, size, shift = load(lanes.cost, 0), load(lanes.size, 0), load(lanes.shift, 0)
    first, half = splat(levels[0]), splat(np.float32(0.5) - levels[0])
    least, most = splat(np.float32(shape.lowest)), splat(np.float32(levels.size - 1))
    cost = splat(np.float32(0))
    for j in range(target.size):
        store(rest, j * LANES, subtract(splat(target[j]), shift))
    for j in range(target.size):
        aim = load(rest, j * LANES)
        if shape.uniform:
            place = floor(multiply_add(aim, inverse, half))
            rounded = subtract(smaller(larger(place, least), most), splat(-levels[0]))
        else:
            scaled = multiply(aim, inverse)
            rounded = first
            for k in range(middles.size):
                gap = splat(levels[k] - levels[k + 1])
                rounded = subtract(rounded, add_where_greater(scaled, splat(middles[k]), gap))
        store(level, j * LANES, rounded)
        value = multiply(rounded, size)
        miss = subtract(aim, value)
        cost = multiply_add(multiply(miss, miss), splat(d[j]), cost)
        error = subtract(subtract(splat(target[j]), shift), value)
        for k in range(j + 1, target.size):
            store(rest, k * LANES, multiply_add(splat(ut[k, j]), error, load(rest, k * LANES)))
    store(lanes.cost, 0, cost)


@jit
def quadratic_lanes(h, lanes):
    """Writes `square`, aᵀ H a of the levels a of each lane; h [sub, sub]."""
    level, total = lanes.level, splat(np.float32(0))
    for j in range(h.shape[0]):
        part = splat(np.float32(0))
        for k in range(j):
            part = multiply_add(splat(h[j, k]), load(level, k * LANES), part)
        own = load(level, j * LANES)
        part = multiply_add(splat(np.float32(0.5) * h[j, j]), own, part)
        total = multiply_add(multiply(splat(np.float32(2)), own), part, total)
    store(lanes.square, 0, total)


@jit
def dot_lanes(vector, lanes, out):
    """Writes out [LANES], the products of a vector [sub] with the levels of each lane."""
    total = splat(np.float32(0))
    for j in range(vector.size):
        total = multiply_add(splat(vector[j]), load(lanes.level, j * LANES), total)
    store(out, 0, total)


@jit
def half_lanes(numbers):
    """Rounds sixteen numbers to F16, the nearest; beyond its range to the largest that F16 has."""
    x = smaller(larger(load(numbers, 0), splat(np.float32(-65504))), splat(np.float32(65504)))
    normal = eleven_bits(x)
    fine = multiply(integer(multiply(x, splat(np.float32(2.0**24)))), splat(np.float32(2.0**-24)))
    size, least = larger(x, subtract(splat(np.float32(0)), x)), splat(np.float32(2.0**-14))
    store(numbers, 0, subtract(normal, add_where_greater(least, size, subtract(normal, fine))))
