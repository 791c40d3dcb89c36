"""The only door to native code: libllama and libggml through llama-cpp-python's low-level bindings.

The library is loaded when the first of its functions is used, not by an import. The modules:

    native       the library: functions, structures, checks, log, versions
    types        tensor types, the kernels that quantize and dequantize rows, rows that a type cannot hold
    presets      the type that llama-quantize gives each tensor
    model        a loaded model and its vocabulary
    context      decoding: its options, batches, logits
    lanes        chunks that are decoded side by side
    workers      threads that share small pieces of work
    observe      callbacks that watch the computation
    activations  callbacks that round or disturb activations
    weights      the weights of a loaded model, read and replaced in place
    devices      back ends, processors, threads, main memory
    torch_devices the device on which torch computes
    cpu_kernels  the special layouts of weights that work on this processor, and the speed of products by type
    deaths       the death of the process inside the library, told in one line
"""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.engine.context import (
        FLASH_ATTN,
        MIN_CTX,
        Context,
        Decoding,
        Floats,
        logit_differences,
        sequence_logits,
    )
    from bitladder.engine.cpu_kernels import begin_check, bytes_per_second, products_per_second
    from bitladder.engine.deaths import tell_of_deaths
    from bitladder.engine.devices import (
        ACCEL,
        CPU,
        GPU,
        GPUS,
        IGPU,
        Device,
        ThreadPool,
        as_torch,
        backend_names,
        device_key,
        device_memory,
        give_back_memory,
        kernels,
        main_memory,
        processors,
        single_threaded,
        torch_device,
    )
    from bitladder.engine.lanes import (
        AHEAD,
        LANES,
        PIECE,
        Aside,
        Lane,
        Lanes,
        Workers,
        in_order,
        lane_count,
        side_by_side,
    )
    from bitladder.engine.model import Model, Tokens
    from bitladder.engine.native import library, log, versions
    from bitladder.engine.observe import (
        HiddenStates,
        Multiplication,
        Observer,
        SatisfiedObserver,
        WatchingUntilSatisfied,
    )
    from bitladder.engine.presets import (
        ALIASES,
        PresetTypes,
        Request,
        check_overrides,
        kernel_needs_importance,
        pattern_error,
        plain_type,
        preset_number,
        preset_types,
        presets,
        storable,
    )
    from bitladder.engine.types import (
        RowKernels,
        TensorType,
        all_types,
        dequantize_into,
        dequantize_rows,
        lost_in,
        lost_rows,
        quantize_rows,
        threads_available,
        type_by_name,
    )
    from bitladder.engine.weights import KernelInputs, NoisyOutputs, Weights

__all__ = [
    "ACCEL",
    "AHEAD",
    "ALIASES",
    "CPU",
    "FLASH_ATTN",
    "GPU",
    "GPUS",
    "IGPU",
    "LANES",
    "MIN_CTX",
    "PIECE",
    "Aside",
    "Context",
    "Decoding",
    "Device",
    "Floats",
    "HiddenStates",
    "KernelInputs",
    "Lane",
    "Lanes",
    "Model",
    "Multiplication",
    "NoisyOutputs",
    "Observer",
    "PresetTypes",
    "Request",
    "RowKernels",
    "SatisfiedObserver",
    "TensorType",
    "ThreadPool",
    "Tokens",
    "WatchingUntilSatisfied",
    "Weights",
    "Workers",
    "all_types",
    "as_torch",
    "backend_names",
    "begin_check",
    "bytes_per_second",
    "check_overrides",
    "dequantize_into",
    "dequantize_rows",
    "device_key",
    "device_memory",
    "give_back_memory",
    "in_order",
    "kernel_needs_importance",
    "kernels",
    "lane_count",
    "library",
    "log",
    "logit_differences",
    "lost_in",
    "lost_rows",
    "main_memory",
    "pattern_error",
    "plain_type",
    "preset_number",
    "preset_types",
    "presets",
    "processors",
    "products_per_second",
    "quantize_rows",
    "sequence_logits",
    "side_by_side",
    "single_threaded",
    "storable",
    "tell_of_deaths",
    "threads_available",
    "torch_device",
    "type_by_name",
    "versions",
]
open_door(__name__)
