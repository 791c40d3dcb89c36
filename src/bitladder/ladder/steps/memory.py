"""The step that finds how much memory a context takes beside the weights."""

from bitladder import plan
from bitladder.errors import BitladderError
from bitladder.gguf import open_model
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import Extent, Product, Step

CONTEXTS = (4096, 8192, 32_768)  # tokens


class Memory(Step):
    """full-precision GGUF → bytes of caches and buffers. They are the same for every quant of the model."""

    verb = "memory"
    algorithms = (plan.MEMORY,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model."""
        return ("convert",)

    def memory(self, extent: Extent) -> float:
        """Those of a process: nothing is loaded."""
        del extent
        return cost.PROCESS

    def make(self, run: Run) -> Product:
        """Asks the library. The facts have the bytes by the tokens of the context."""
        with open_model(run.full) as file:
            longest = int(file.get(f"{file.architecture}.context_length") or CONTEXTS[-1])
        contexts = [tokens for tokens in CONTEXTS if tokens <= longest] or [longest]
        try:
            beside = plan.memory_beside_weights(run.full, contexts, threads=self.options.decoding.threads)
        except BitladderError as error:
            run.progress.warn(f"the memory that a context takes is not known: {error}")
            beside = {}
        return Product([], {"beside": {str(tokens): size for tokens, size in beside.items()}})
