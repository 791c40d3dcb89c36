"""Vectors of sixteen float32 numbers for numba's kernels, a lane for each: what its own loops over lanes do not become.

The types and operations are LLVM's, so that every processor gets the widest instructions that it has.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

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
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return _VECTOR_TYPE(number), code


def _operation(count: int, emit: Callable[..., Any], doc: str) -> Any:
    """An operation on each lane of `count` vectors."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return emit(builder, *values)

    def one(typing: Any, first: Any) -> Any:
        return _VECTOR_TYPE(first), code

    def two(typing: Any, first: Any, second: Any) -> Any:
        return _VECTOR_TYPE(first, second), code

    def three(typing: Any, first: Any, second: Any, third: Any) -> Any:
        return _VECTOR_TYPE(first, second, third), code

    function = (one, two, three)[count - 1]
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
