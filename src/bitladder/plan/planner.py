"""The plan: a model, a target and constraints in; a recipe, its reasons and its prices out."""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Literal

from bitladder.engine.model import Model
from bitladder.engine.native import versions
from bitladder.engine.types import TensorType, type_by_name
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import HiddenBase, Settings, load_or_compute_base
from bitladder.plan.allocate import Allocation, Problem
from bitladder.plan.constraints import Constraints
from bitladder.plan.feedback import Feedback, FeedbackEffort, Found, Tried
from bitladder.plan.priced_problem import Prices, limits_of, options_of, prices_of
from bitladder.plan.prices.document import Made, Sensitivity, load_sensitivity
from bitladder.plan.prices.menu import Window, menu_types, tensor_menu
from bitladder.plan.prices.price import Effort, price
from bitladder.plan.subject import Preset, Subject
from bitladder.plan.target import Target, memory_beside_weights, vram_bytes
from bitladder.progress import SILENT, Progress
from bitladder.quantize import RUNGS
from bitladder.recipe import FileUsed, ImatrixUsed, Recipe, write_recipe
from bitladder.text.excerpts import excerpts
from bitladder.text.texts import Text
from bitladder.trial.candidate import Candidate
from bitladder.trial.journal import Journal
from bitladder.trial.render import Renderer, Rounding

Menus = dict[str, tuple[TensorType, ...]]


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to plan with.

    `menu` as for `sensitivity.menu.menu_types`; `settings` how to measure (n_ctx tokens a chunk, threads); `method`
    forward passes or gradients (extra: torch);
    `effort` for prices, `feedback` for measured recipes (None: none is measured); `work` the folder of rendered
    tensors and measurements; `rounding` None for the library's kernels.
    """

    menu: str = "all"
    fast: tuple[TensorType, ...] | None = None
    constraints: Constraints = dataclasses.field(default_factory=Constraints)
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(n_ctx=256))
    method: Literal["forward", "fisher"] = "forward"
    effort: Effort = dataclasses.field(default_factory=Effort)
    feedback: FeedbackEffort | None = dataclasses.field(default_factory=FeedbackEffort)
    work: pathlib.Path | None = None
    rounding: Rounding | None = None
    speeds: Mapping[str, float] | None = None
    cache_bytes: int = 16 << 30


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """What came out.

    `found` is None without feedback; then `allocation` is what the prices alone say. `types` names every tensor of the
    model. `preset` is the one compared with, and `bytes` the exact size of the file.
    """

    types: dict[str, str]
    bytes: int
    allocation: Allocation
    problem: Problem
    sensitivity: Sensitivity
    preset: Preset | None
    found: Found | None
    text: str
    tokens: int
    seconds: float


class Planner:
    """Plans for one model: prices once, then any number of targets.

    Parameters: `text` to measure on, which should be neither what the importance was computed on nor what the result
    is judged by. Use as a context manager.
    """

    def __init__(self, subject: Subject, text: Text, options: PlanOptions, progress: Progress = SILENT) -> None:
        self.subject, self.options, self.progress = subject, options, progress
        # Without feedback the text is the same as with it, so that prices once found serve both.
        wanted = options.feedback.text_chunks if options.feedback else options.settings.chunks or 0
        chunks = max(options.effort.chunks, wanted)
        self.settings = dataclasses.replace(options.settings, chunks=chunks)
        self.text = excerpts(text, chunks, self.settings.n_ctx)
        self.work = options.work or subject.path.with_name(f"{subject.path.stem}.plan")
        self.renderer = Renderer(
            subject.file,
            subject.importance,
            rounding=options.rounding,
            folder=self.work / "rendered",
            max_bytes=min(options.cache_bytes, shutil.disk_usage(subject.path.parent).free // 2),
            threads=options.settings.threads,
        )
        self._limits = limits_of(subject, options.constraints)
        self._names = set(subject.tensors)
        self._base: HiddenBase | None = None
        self._model: Candidate | None = None
        self.journal: Journal | None = None

    def __enter__(self) -> "Planner":
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._model, self._base, self.renderer):
            if one is not None:
                one.close()

    def menus(self, window: Window, preset: Preset | None = None) -> Menus:
        """The types of each tensor: the menu's within a window, and a preset's."""
        types = menu_types(self.options.menu, self.options.fast)
        found: Menus = {}
        for name in self.subject.tensors:
            tensor = self.subject.file.tensors[name]
            menu = tensor_menu(
                tensor,
                types,
                window,
                k_menu=self.options.menu in ("k", "iq"),
                weighted=name in self.subject.importance,
                needy=self.subject.needy(name),
            )
            extra = type_by_name(preset.types[name]) if preset else None
            if extra is not None and extra not in menu and extra.quantized:
                menu = tuple(sorted((*menu, extra), key=lambda kind: kind.bpw))
            if menu:  # else it stays as it is
                found[name] = menu
        if not found:
            raise UsageError(f"--menu {self.options.menu}: no type of it fits any tensor of {self.subject.path}")
        return found

    def made(self) -> Made:
        """What prices and measurements depend on."""
        base, subject = self.base(), self.subject
        return Made(
            model=subject.path.name,
            model_sha256=base.model.sha256,
            imatrix=subject.imatrix_path.name if subject.imatrix_path else None,
            imatrix_sha256=subject.imatrix_sha256,
            text=self.text.name,
            text_sha256=self.text.sha256,
            n_ctx=self.settings.n_ctx,
            rounding=self.renderer.rounding.key,
            versions=versions(),
        )

    def base(self) -> HiddenBase:
        """The full-precision predictions of the text."""
        if self._base is None:
            path = self.work / f"{self.text.sha256[:12]}.{self.settings.n_ctx}.base"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = load_or_compute_base(
                self.subject.path, self.text, self.settings, path=path, progress=self.progress
            )
        return self._base

    def model(self) -> Candidate:
        """The loaded model in which recipes are tried."""
        if self._model is None:
            self._model = Candidate(self.base(), self.renderer, self.settings)
        return self._model

    def measurements(self) -> Journal:
        """What has been measured of this model, text, importance and rounding."""
        if self.journal is None:
            context = json.dumps(self.made().model_dump(exclude={"model", "imatrix", "text"}), sort_keys=True)
            inputs = "kernel inputs" if self.settings.gpu_layers == 0 else "float inputs"
            digest = hashlib.sha256((context + inputs).encode()).hexdigest()
            self.journal = Journal(self.work / "measured.jsonl", digest, self.settings.n_ctx)
        return self.journal

    def price(self, window: Window, preset: Preset | None = None) -> Sensitivity:
        """Price every type in a window."""
        return self.price_menus(self.menus(window, preset))

    def price_menus(self, menus: Menus) -> Sensitivity:
        """Price the types on these menus."""
        if self.options.method == "fisher":
            from bitladder.plan.prices.fisher_prices import price_by_gradients

            return price_by_gradients(
                self.renderer,
                self.model(),
                menus,
                self.subject.places,
                self.measurements(),
                self.made(),
                self.options.effort,
                self.base().chunks.tokens,
                threads=self.settings.threads,
                progress=self.progress,
            )
        return price(
            self.renderer,
            self.model(),
            menus,
            self.subject.places,
            self.measurements(),
            self.made(),
            self.options.effort,
            self.progress,
        )

    def build_priced(self, sensitivity: Sensitivity) -> Problem:
        """The problem that uncorrected prices make."""
        return self.build(prices_of(sensitivity))

    def measured_kld(self, preset: Preset) -> float:
        """The KLD of a preset on the text that recipes are measured on, nats per token."""
        chunks = self.options.feedback.chunks if self.options.feedback else self.settings.chunks or 1
        types = {
            n: k for n, k in preset.types.items() if n in self._names and k != self.subject.file.tensors[n].type.name
        }
        return self.measurements().measure(self.model(), types, chunks, f"preset {preset.name}").kld

    def prices_for(self, target: Target, preset: Preset | None = None) -> Sensitivity:
        """Prices of all types near a target: those kept in the work folder if they have them, else measured.

        For a KLD the window cannot be known beforehand; then it is as wide as makes sense at 5 bits per weight.
        """
        bpw = 5.0
        if target.max_bytes is not None:
            bpw = 8 * max(target.max_bytes - self.header_bytes(), 0) / self.subject.weights()
        method = self.options.method
        name = "sensitivity.json" if method == "forward" else f"sensitivity-{method}.json"
        window, kept = Window.around(bpw), self.work / name
        menus = self.menus(window, preset)
        if kept.is_file():
            found = load_sensitivity(kept)
            wanted = {(name, kind.name) for name, menu in menus.items() for kind in menu}
            have = {(name, kind) for name, tensor in found.tensors.items() for kind in tensor.kld}
            if found.made == self.made() and found.method == method and wanted <= have:
                self.progress.info(f"prices of {kept.name}: nothing is measured again for them")
                return found
        made = self.price(window, preset)
        made.save(kept)
        return made

    def known(self, path: pathlib.Path) -> Sensitivity:
        """Prices from a file. Raises BitladderError if they are of another model, or of other tensors."""
        found = load_sensitivity(path)
        if not found.tensors.keys() <= set(self.subject.tensors):
            odd = min(found.tensors.keys() - set(self.subject.tensors))
            raise BitladderError(f"{path} belongs to another model: {self.subject.path} has no tensor {odd}")
        if found.made.imatrix_sha256 != self.subject.imatrix_sha256:
            self.progress.warn(f"{path} was made with another imatrix")
        return found

    def build(self, prices: Prices) -> Problem:
        """The problem that prices and constraints make."""
        return dataclasses.replace(self._limits, options=options_of(self.subject, prices, self.options.speeds))

    def header_bytes(self) -> int:
        """Bytes of a planned file that are no weights: header and padding."""
        norms = sum(tensor.nbytes for name, tensor in self.subject.file.tensors.items() if name not in self._names)
        return self._limits.fixed_bytes - norms

    def beside(self, memory: int, context: int, text: str) -> int:
        """Bytes that a file may have beside KV cache and buffers of a context of so many tokens.

        Raises UsageError if those alone are too large.
        """
        settings = self.settings
        with Model(self.subject.path, gpu_layers=settings.gpu_layers) as model:
            return vram_bytes(memory, memory_beside_weights(model, context, settings.threads), text)

    def write_recipe(self, path: pathlib.Path, result: PlanResult, target: Target) -> None:
        """Write the recipe with what is known of how it was made."""
        subject, made = self.subject, result.sensitivity.made
        imatrix = None
        if subject.imatrix_path is not None and subject.imatrix is not None:
            imatrix = ImatrixUsed(
                name=subject.imatrix_path.name,
                sha256=subject.imatrix_sha256,
                entries=len(subject.imatrix.entries),
                chunks=subject.imatrix.chunk_count,
                n_ctx=subject.imatrix.chunk_size,
            )
        way = result.found.best.name if result.found is not None else "exact, not measured"
        write_recipe(
            path,
            Recipe(
                model=str(subject.file.get("general.name") or subject.path.stem),
                budget=target.text,
                bytes=result.bytes,
                bpw=8 * sum(subject.plain_bytes(n, k) for n, k in result.types.items()) / subject.weights(),
                made=f"bitladder plan: {way}; {result.sensitivity.method} prices on {made.text}",
                source=FileUsed(name=made.model, sha256=made.model_sha256),
                imatrix=imatrix,
                versions=versions(),
                tensors=result.types,
            ),
        )

    def fitting_preset(self, max_bytes: int) -> Preset | None:
        """The largest of the usual presets that is not above a size; None if all are."""
        found = None
        for name in RUNGS:
            try:
                preset = self.subject.preset(name)
            except BitladderError:
                continue
            if preset.bytes <= max_bytes and (found is None or preset.bytes > found.bytes):
                found = preset
        return found

    def plan(
        self,
        target: Target,
        sensitivity: Sensitivity,
        preset: Preset | None = None,
        rivals: Mapping[str, Mapping[str, str]] | None = None,
    ) -> PlanResult:
        """A recipe for a target. `preset` is what it must not be worse than; `rivals` are tried beside it."""
        began = time.monotonic()
        prices = prices_of(sensitivity)
        if self.options.feedback is None:
            problem = self.build(prices)
            allocation = target.solve(problem)
            types, found, tokens = allocation.types, None, 0
        else:
            journal = self.measurements()
            before = journal.tokens
            feedback = Feedback(
                prices,
                self.subject.places,
                target,
                self.build,
                journal,
                self.model(),
                self.options.feedback,
                {name: self.subject.file.tensors[name].type.name for name in self.subject.tensors},
                self.subject.tensor_bytes,
            )
            others: dict[str, Mapping[str, str]] = {}
            if preset is not None:
                others[f"preset {preset.name}"] = {name: preset.types[name] for name in self.subject.tensors}
            found = feedback.run(others | dict(rivals or {}), self.progress)
            problem, allocation, types = found.problem, found.allocation, found.best.types
            tokens = journal.tokens - before
        whole = {name: types.get(name, tensor.type.name) for name, tensor in self.subject.file.tensors.items()}
        return PlanResult(
            whole,
            self.subject.file_bytes(types),
            allocation,
            problem,
            sensitivity,
            preset,
            found,
            self.text.name,
            tokens,
            time.monotonic() - began,
        )


__all__ = ["PlanOptions", "PlanResult", "Planner", "Tried"]
