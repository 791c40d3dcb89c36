"""GGUF files: read, checked, and streamed out; and the names of tensors.

The `gguf` package decodes every token of the vocabulary into Python objects, and its writer encodes them again. A
quantizer passes metadata on as they are, so here a value stays bytes until it is asked for. A file with 50,000 tokens
opens in milliseconds, and a copied value cannot change.
"""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.gguf.header import (
        ARRAY,
        BOOL,
        DEFAULT_ALIGNMENT,
        F32,
        SCALARS,
        TensorInfo,
        Value,
        i32,
        open_regular,
        read_header,
        scalar,
        string,
        strings,
        u16,
        u32,
    )
    from bitladder.gguf.names import (
        EMBEDDING,
        HEAD,
        around_block,
        block_of,
        block_prefix,
        imatrix_order,
        imatrix_place,
        in_main_block,
        in_previous_block,
        kind_of,
        name_in_block,
        one_line,
        ranges,
        reading_order,
    )
    from bitladder.gguf.reader import (
        GgufFile,
        describe_kind,
        joined_sha256,
        open_model,
        plain_path,
        prediction_tensors,
        refuse_other_model,
        refuse_other_vectors,
        shard_path,
        shards_of,
        stem,
    )
    from bitladder.gguf.writer import (
        GgufWriter,
        TensorPlan,
        file_size,
        group_as,
        group_by_size,
        output_paths,
        padded,
        split_sizes,
        writing,
    )

__all__ = [
    "ARRAY",
    "BOOL",
    "DEFAULT_ALIGNMENT",
    "EMBEDDING",
    "F32",
    "HEAD",
    "SCALARS",
    "GgufFile",
    "GgufWriter",
    "TensorInfo",
    "TensorPlan",
    "Value",
    "around_block",
    "block_of",
    "block_prefix",
    "describe_kind",
    "file_size",
    "group_as",
    "group_by_size",
    "i32",
    "imatrix_order",
    "imatrix_place",
    "in_main_block",
    "in_previous_block",
    "joined_sha256",
    "kind_of",
    "name_in_block",
    "one_line",
    "open_model",
    "open_regular",
    "output_paths",
    "padded",
    "plain_path",
    "prediction_tensors",
    "ranges",
    "read_header",
    "reading_order",
    "refuse_other_model",
    "refuse_other_vectors",
    "scalar",
    "shard_path",
    "shards_of",
    "split_sizes",
    "stem",
    "string",
    "strings",
    "u16",
    "u32",
    "writing",
]
open_door(__name__)
