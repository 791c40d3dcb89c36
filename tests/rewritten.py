"""A GGUF with other weights or metadata, written by the gguf package."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def rewritten(
    source: pathlib.Path,
    out: pathlib.Path,
    edit: Callable[[str, Floats], Floats] | None = None,
    kind: type = np.float32,
    *,
    architecture: str | None = None,
    metadata: Callable[[str, Any], Any] = lambda _, value: value,
    numbers: Mapping[str, float | list[float]] | None = None,
    extra: Iterable[tuple[str, Floats]] = (),
    without: Iterable[str] = (),
) -> pathlib.Path:
    """Writes the model `source` to `out`.

    Parameters:
        source: the model.
        out: the file to write.
        edit: returns the weights of a tensor; matrices become `kind`, vectors F32. None copies all tensors.
        kind: type of the matrices that are edited.
        architecture: its new architecture, or None.
        metadata: returns the value of a key.
        numbers: further values of the architecture, by the key without its first part; lists, by the whole key.
        extra: further tensors.
        without: endings of names of tensors that are left out.
    """
    reader = gguf.GGUFReader(source)
    old = str(reader.fields["general.architecture"].contents())
    new = architecture or old
    writer = gguf.GGUFWriter(out, new)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            value = metadata(key, field.contents())
            writer.add_key_value(key.replace(f"{old}.", f"{new}."), value, field.types[0], sub_type=inner)
    for key, number in (numbers or {}).items():
        if isinstance(number, list):
            writer.add_array(key, number)
            continue
        (writer.add_uint32 if isinstance(number, int) else writer.add_float32)(f"{new}.{key}", number)
    for tensor in reader.tensors:
        if tensor.name.endswith(tuple(without)):
            continue
        if edit is None:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        shape = tuple(reversed(tensor.shape.tolist()))
        values = edit(tensor.name, np.array(tensor.data, np.float32).reshape(shape))
        writer.add_tensor(tensor.name, values.astype(kind if len(shape) > 1 else np.float32))
    for name, values in extra:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
