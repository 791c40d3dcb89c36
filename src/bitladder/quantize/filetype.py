"""general.file_type: the one number by which other programs name a quant."""

from bitladder.engine.presets import Request, preset_number, preset_types, presets
from bitladder.engine.types import TensorType
from bitladder.errors import BitladderError
from bitladder.gguf.reader import GgufFile
from bitladder.quantize.choose_types import Choice
from bitladder.quantize.quantize_options import QuantizeOptions


def file_type(file: GgufFile, options: QuantizeOptions, choice: Choice) -> int:
    """The llama_ftype to write: the preset's own, as llama-quantize does, or that of the nearest preset.

    COPY keeps the source's. A recipe without a preset gets the preset whose tensor bytes are nearest; of several, the
    one that shares most weights' types with it, and then the lowest number.
    """
    if options.preset is not None and not options.copies:
        return preset_number(options.preset)
    if options.copies and (known := file.get("general.file_type")) is not None:
        return int(known)
    return nearest_preset(file, choice)


def nearest_preset(file: GgufFile, choice: Choice) -> int:
    """The number of the preset whose tensor bytes, on this model, are nearest to the choice's."""
    shapes = {tensor.name: tensor.source for tensor in choice.tensors}
    chosen = {tensor.name: tensor.type for tensor in choice.tensors}

    def size(types: dict[str, TensorType]) -> int:
        return sum(kind.row_bytes(shapes[name].width) * shapes[name].rows for name, kind in types.items())

    ranked = []
    for number in presets().values():
        try:
            types = preset_types(file.path, _plain(choice.request, number)).types
        except BitladderError:
            continue  # a number without a preset behind it, or a width that no type of this preset can hold
        same = sum(shapes[name].elements for name, kind in types.items() if chosen[name] == kind)
        ranked.append((abs(size(types) - size(chosen)), -same, number))
    return min(ranked)[2]


def _plain(request: Request, number: int) -> Request:
    return Request(str(number), imatrix=request.imatrix, kv=request.kv, prune_layers=request.prune_layers)
