"""A GGUF with other weights, written by the gguf package."""

import pathlib
from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def rewritten(
    source: pathlib.Path, out: pathlib.Path, edit: Callable[[str, Floats], Floats], kind: type = np.float32
) -> pathlib.Path:
    """Writes the model `source` to `out`: tensors as `edit` returns them, matrices as `kind`, vectors as F32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, str(architecture))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            of = field.types[0]
            inner = field.types[-1] if of == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), of, sub_type=inner)
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        values = edit(tensor.name, np.array(tensor.data, np.float32).reshape(shape))
        writer.add_tensor(tensor.name, values.astype(kind if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
