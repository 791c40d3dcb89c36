"""The step that converts the checkpoint; a GGUF given as MODEL is used where it is."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bitladder import convert
from bitladder.errors import UsageError
from bitladder.files import sha256_file
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.source import check_headers, describe
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step, gguf_library

CONVERT = 2e-9  # seconds of a byte that is written


class Convert(Step):
    """checkpoint → full-precision GGUF, and the projector of images or sounds."""

    verb = "convert"
    algorithms = (convert.CONVERT,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The checkpoint, and the script that converts it."""
        return ("model", "converter") if self.options.conversion.converter else ("model",)

    def decides(self) -> Mapping[str, Any]:
        """The type of the matrices, whose converter is asked for, and whether a projector is wanted."""
        conversion = self.options.conversion
        return {"outtype": conversion.outtype, "upstream": conversion.upstream, "mmproj": conversion.mmproj}

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """If llama.cpp's own converter converts: its version, and the code of the checkpoint that it may run."""
        conversion, source = self.options.conversion, run.source
        if source.is_gguf or not convert.uses_upstream(
            source.path, upstream=conversion.upstream, converter=conversion.converter
        ):
            return {}
        facts: dict[str, Any] = {}
        if conversion.converter is None:
            facts["converter library"] = convert.library_version()
        if conversion.trust_remote_code:
            code = sorted(source.path.glob("*.py"))
            facts["code"] = {path.name: run.store.sha256(path, f"model: {path.name}") for path in code}
        return facts

    @property
    def library(self) -> str:
        """Conversion does not use the native library."""
        return gguf_library()

    def parts(self, extent: Extent) -> list[Part]:
        """Reading and writing: little."""
        return [Part("convert", CONVERT * extent.converted)] if extent.converted else []

    def memory(self, extent: Extent) -> float:
        """The largest matrix, as it is read and as it is written."""
        return cost.PROCESS + 8 * extent.shape.largest

    def room(self, extent: Extent) -> Room:
        """The full-precision file."""
        return Room(extent.converted)

    def inputs(self, run: Run, digests: Mapping[str, Any]) -> dict[str, Any]:
        """As of every step. If MODEL is the file that the step wrote, the step stays as it is."""
        last = run.store.manifest.steps.get(self.name)
        own = last and last.outputs and run.source.is_full_model_of(last, run.store)
        if last and own and run.store.complete(self.name, last.inputs):
            return last.inputs
        return super().inputs(run, digests)

    def make(self, run: Run) -> Product:
        """Converts. The facts describe the model for later steps and the card."""
        return self._used_in_place(run) if run.source.is_gguf else self._converted(run)

    def completed(self, run: Run) -> None:
        """Refuses files of --compare that are of another model, before hours of work."""
        for other in run.others.values():
            check_headers(other, run.full)

    def _refuse_other_model(self, run: Run, converted: pathlib.Path) -> None:
        """Refuses a checkpoint that is not that of the GGUF of which the ladder was made."""
        last = run.store.manifest.steps.get(self.name)
        if last is None or last.outputs or run.options.replace_model:
            return
        if sha256_file(converted) != last.facts["sha256"]:
            run.store.withdraw()
            raise UsageError(
                f"--out {run.options.out} has the ladder of {last.facts['file']}, and {run.source.name} converts to "
                f"another file; name another directory, or give --replace to replace that ladder"
            )

    def _used_in_place(self, run: Run) -> Product:
        path = run.source.path
        return Product([], {**describe(path), "sha256": run.store.sha256(path, f"model: {path.name}")})

    def _converted(self, run: Run) -> Product:
        hidden, hidden_projector = run.layout.converting, run.layout.converting_projector
        try:
            converted = convert.convert(
                run.source.path,
                hidden,
                outtype=self.options.conversion.outtype,
                upstream=self.options.conversion.upstream,
                converter=self.options.conversion.converter,
                trust_remote_code=self.options.conversion.trust_remote_code,
                projector=hidden_projector if self.options.conversion.mmproj else None,
                threads=self.options.decoding.threads,
                progress=run.progress,
            )
            facts = describe(hidden)
            self._refuse_other_model(run, hidden)
            path = run.layout.full(facts["stem"], facts["encoding"])
            hidden.replace(path)
            paths = [path]
            if converted.projector is not None:
                paths.append(run.layout.projector(path))
                hidden_projector.replace(paths[-1])
                facts |= {"projector": {"file": paths[-1].name, "bytes": paths[-1].stat().st_size}}
        finally:
            hidden.unlink(missing_ok=True)
            hidden_projector.unlink(missing_ok=True)
        return Product(paths, facts | {"file": path.name, "sha256": run.store.sha256(path, path.name)})
