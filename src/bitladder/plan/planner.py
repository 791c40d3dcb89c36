"""The plan: a model, a target and constraints in; a recipe, its reasons and its prices out."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.calibrate import MomentsFile, zeros_in
from bitladder.engine import TensorType, type_by_name, versions
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import HiddenBase
from bitladder.files import Closing
from bitladder.keys import key_of, versions_of
from bitladder.plan.allocate.problem import Problem
from bitladder.plan.feedback import Feedback, FeedbackResult, PlanProblem
from bitladder.plan.options import MENUS, PlanOptions
from bitladder.plan.prices.menu import (
    PricedFrom,
    TypePrices,
    Window,
    load_prices,
    measured_speeds,
    menu_order,
    menu_types,
    tensor_menu,
)
from bitladder.plan.prices.price import FISHER_PRICES, PRICES, PriceSource, price, price_by_gradients
from bitladder.plan.result import PlanResult
from bitladder.plan.subject import Preset, Prices, Subject, limits_of, menus_of
from bitladder.plan.target import Target
from bitladder.progress import SILENT, Progress
from bitladder.refine import OutputRounding, refuse_other_moments
from bitladder.rounding import RoundingOptions
from bitladder.text import Text, excerpts
from bitladder.trial import (
    Helpers,
    Journal,
    MeasuredRecipe,
    Measurements,
    ModelPair,
    Renderer,
    SwappedModel,
    Wanted,
    copies,
    kept_base,
    measurement_inputs,
    recipe_key,
    render_all,
)
from bitladder.units import number_of, some_of

RENDERED = "rendered"  # folder of the rendered blocks in the work folder


@dataclasses.dataclass(frozen=True)
class PlanInputs:
    """What a plan reads.

    Parameters:
        model: path of a full-precision GGUF.
        imatrix: path of the importance matrix of the same model, or None.
        texts: what recipes are measured on: passages of each. It should be neither the text of the imatrix nor the one
            to judge by.
        moments: paths of second moments of the same model. None of them: the library's own blocks are priced.
        rounding: how blocks are chosen by these moments.
        work: folder for rendered blocks, measurements and prices; None for MODEL.plan beside the model.
    """

    model: pathlib.Path
    imatrix: pathlib.Path | None
    texts: Sequence[Text]
    moments: tuple[pathlib.Path, ...] = ()
    rounding: RoundingOptions = dataclasses.field(default_factory=RoundingOptions)
    work: pathlib.Path | None = None


def planning_text(texts: Sequence[Text], options: PlanOptions) -> Text:
    """The passages of texts on which recipes are measured."""
    return excerpts(texts, options.chunks, options.decoding.n_ctx)


class Planner(Closing):
    """Plans for one model: prices once, then any number of targets.

    Parameters:
        inputs: the files and the texts.
        options: how to plan.
        progress: where work is shown.

    Raises:
        BitladderError: a file cannot be used, or does not belong to the model.
    """

    def __init__(self, inputs: PlanInputs, options: PlanOptions, progress: Progress = SILENT) -> None:
        self.options, self.progress = options, progress
        self.helpers: Helpers | None = None  # other machines that render and measure for this one
        self._settings = options.decoding.measuring(options.chunks)
        self.text = planning_text(inputs.texts, options)
        self.work = inputs.model.with_name(f"{inputs.model.stem}.plan") if inputs.work is None else inputs.work
        with contextlib.ExitStack() as opened:
            self.subject = opened.enter_context(Subject(inputs.model, inputs.imatrix, options.unreached_type))
            if unreached := self.subject.unreached:
                progress.warn(
                    f"no calibration text reaches {some_of(unreached, 'tensor')}: not planned, Q8_0 instead; "
                    f"prediction heads get {options.unreached_type} (--unreached-type)"
                )
            if self.subject.imatrix and (zeros := zeros_in(self.subject.imatrix, self.subject.tensors)):
                progress.warn(zeros)
            rounding = None
            if inputs.moments and inputs.rounding.method != "stock":
                moments = [opened.enter_context(MomentsFile(path)) for path in inputs.moments]
                refuse_other_moments(moments, self.subject.file, progress)
                # Every type of every tensor is rounded. What more passes gain is nearly the same share for all.
                passes = min(inputs.rounding.passes, options.prices.price_passes)
                how = dataclasses.replace(inputs.rounding, passes=passes)
                rounding = OutputRounding(moments, how, options.decoding.device, progress)
            self.renderer = Renderer(
                self.subject.file,
                self.subject.importance,
                rounding=rounding,
                folder=self.work / RENDERED,
                max_bytes=options.cache_bytes,
                threads=options.decoding.threads,
            )
            opened.callback(self.renderer.close)
            self._limits = limits_of(self.subject, options.constraints)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Frees the loaded model and closes the files."""
        self._opened.close()

    @functools.cached_property
    def base(self) -> HiddenBase:
        """The full-precision predictions of the text."""
        base = kept_base(self.work, self.subject.path, self.text, self._settings, self.progress)
        return self._opened.enter_context(base)

    @functools.cached_property
    def models(self) -> ModelPair:
        """The models in which recipes are tried, loaded when a recipe is measured that the journal does not have."""
        copied = copies(self.subject.file.tensor_bytes, self.options.decoding)
        load = functools.partial(SwappedModel, self.base, self.renderer, self._settings)
        return self._opened.enter_context(ModelPair(load, copied))

    @functools.cached_property
    def _measured_from(self) -> dict[str, Any]:
        """Everything that decides the KLD of a recipe on the first chunks of the text."""
        return measurement_inputs(self.base, self.renderer, self.options.decoding)

    def price_key(self) -> str:
        """The hash of everything that decides prices. Prices with the same key are valid."""
        method = self.options.prices.method
        decides = self._measured_from | {
            "prices": self.options.prices,
            "algorithms": versions_of(PRICES if method == "forward" else FISHER_PRICES),
        }
        if method == "fisher":
            decides["chunks"] = self._settings.limit(len(self.base.chunks))
        return key_of(decides)

    @functools.cached_property
    def _journal(self) -> Journal:
        return Journal(self.work / "measured.jsonl", key_of(self._measured_from), self._settings.n_ctx)

    def measurements(self) -> Measurements:
        """A new record of what one piece of work measures, with the journal as its cache."""
        return Measurements(self._journal, self.models, self._expect)

    def _expect(self, wanted: Sequence[Wanted]) -> None:
        if self.helpers is not None:
            self.helpers.measure(self._journal, wanted, "measure on other machines", self.progress)
            return
        unknown = {recipe_key(types): types for types, chunks, _ in wanted if not self._journal.knows(types, chunks)}
        if all(chunks == 1 for _, chunks, _ in wanted):
            self.models.expect(list(unknown.values()))

    def render_share(self, pairs: Sequence[tuple[str, str]], room: int) -> dict[tuple[str, str], float]:
        """Renders a share of the tensors for another machine, which gets the errors (`trial.Helpers`).

        Parameters:
            pairs: name of a tensor and name of a type.
            room: bytes of blocks that are kept.
        """
        self.renderer.room = room
        return render_all(self.renderer, pairs, progress=self.progress)

    def measure_share(self, wanted: Sequence[Wanted]) -> list[MeasuredRecipe]:
        """Measures a share of the recipes for another machine (`trial.Helpers`)."""
        measurements = self.measurements()
        measurements.expect(wanted)
        return [measurements.measure(*each) for each in wanted]

    @functools.cached_property
    def _speeds(self) -> dict[str, float]:
        """Type → bytes per second on this CPU, if a constraint or the menu needs it."""
        needed = self.options.menu == "fast" or self.options.constraints.min_speed is not None
        return measured_speeds(self.options.decoding.threads) if needed else {}

    def window(self, *bpw: float) -> Window:
        """The bits per weight that tensors of recipes of these averages may have."""
        return Window(min(bpw) - self.options.bpw_below, max(bpw) + self.options.bpw_above)

    def menus(self, window: Window, *presets: Preset) -> dict[str, tuple[TensorType, ...]]:
        """The types of each tensor: the menu's within a window, and those of presets.

        A tensor that no type fits has no menu and stays as it is. Raises UsageError if that is every tensor.
        """
        options, subject = self.options, self.subject
        types = menu_types(options.menu, self._speeds, options.fast_share)
        menus = {}
        for name in subject.tensors:
            menu = tensor_menu(
                subject.file.tensors[name],
                types,
                window,
                k_menu=options.menu in ("k", "iq"),
                weighted=name in subject.importance,
                needy=subject.needy(name),
            )
            extra = {kind for preset in presets if (kind := type_by_name(preset.types[name])).quantized}
            if extra or menu:
                menus[name] = tuple(sorted({*menu, *extra}, key=menu_order))
        if not menus:
            raise UsageError(f"--menu {options.menu}: no type of it fits any tensor of {subject.path}")
        return menus

    def price(self, window: Window, *presets: Preset) -> TypePrices:
        """Prices every type of the menus."""
        self.models.close()  # rounding takes the memory
        menus, options = self.menus(window, *presets), self.options
        source = PriceSource(
            self.renderer,
            self.subject.places,
            self.measurements(),
            options.prices,
            self.price_key(),
            self._made(),
            self.helpers,
        )
        if options.prices.method == "forward":
            return price(source, menus, self.progress)
        chunks = self.base.chunks.tokens[: self._settings.limit(len(self.base.chunks))]
        return price_by_gradients(source, menus, chunks, threads=options.decoding.threads, progress=self.progress)

    def _made(self) -> PricedFrom:
        subject = self.subject
        return PricedFrom(
            model=subject.path.name,
            model_sha256=self.base.model.sha256,
            imatrix=subject.imatrix_path.name if subject.imatrix_path else None,
            imatrix_sha256=subject.imatrix_sha256,
            text=self.text.name,
            text_sha256=self.text.sha256,
            n_ctx=self._settings.n_ctx,
            rounding=self.renderer.rounding.key,
            versions=versions(),
        )

    def _bpw(self, target: Target) -> float:
        """The bits per weight of a target. For a KLD they are not known beforehand; 5 are assumed."""
        if target.max_bytes is None:
            return 5.0
        return 8 * max(target.max_bytes - self.subject.header_bytes(), 0) / self.subject.weights()

    def check_reachable(self, target: Target, preset: Preset | None = None) -> None:
        """Refuses a target that no recipe of the menu meets, before anything is measured.

        With a menu of named types, those of the preset do not count: nobody asked for them.

        Raises UsageError that gives the smallest possible size and the constraints behind it.
        """
        named = self.options.menu not in MENUS
        menus = self.menus(self.window(self._bpw(target)), *(() if preset is None or named else (preset,)))
        free = {name: dict.fromkeys((kind.name for kind in menu), 0.0) for name, menu in menus.items()}
        try:
            target.solve(self.build(free))
        except BitladderError as error:
            menu = f"--menu {self.options.menu}: " if named else ""
            raise UsageError(f"{menu}{error}") from error

    def prices_for(self, target: Target, preset: Preset | None = None) -> TypePrices:
        """Prices of all types near a target: the kept ones if they are valid and complete, else new ones."""
        bpw, method = self._bpw(target), self.options.prices.method
        path = self.work / ("sensitivity.json" if method == "forward" else f"sensitivity-{method}.json")
        presets = () if preset is None else (preset,)
        kept = self._kept(path)
        if kept is not None:
            menus = self.menus(self.window(bpw), *presets)
            if kept.covers({name: [kind.name for kind in menu] for name, menu in menus.items()}):
                self.progress.info(f"prices are those of {path.name} and are not measured again")
                return kept
        prices = self.price(self.window(bpw), *presets)
        prices.save(path)
        return prices

    def _kept(self, path: pathlib.Path) -> TypePrices | None:
        """The prices in a file of the work folder if they are valid."""
        try:
            kept = load_prices(path) if path.is_file() else None
        except BitladderError:
            return None  # of another version
        return kept if kept is not None and kept.key == self.price_key() else None

    def known(self, path: pathlib.Path) -> TypePrices:
        """Prices from a file of the user's. Raises BitladderError if they are of other tensors."""
        prices = load_prices(path)
        if not prices.tensors.keys() <= set(self.subject.tensors):
            odd = min(prices.tensors.keys() - set(self.subject.tensors))
            raise BitladderError(f"{path} belongs to another model: {self.subject.path} has no tensor {odd}")
        if prices.made.imatrix_sha256 != self.subject.imatrix_sha256:
            self.progress.warn(f"{path} was made with another imatrix")
        return prices

    def build(self, prices: Prices) -> Problem:
        """The problem that prices and constraints make."""
        return dataclasses.replace(self._limits, options=menus_of(self.subject, prices, self._speeds))

    def full_types(self) -> dict[str, str]:
        """The type of each tensor in full precision."""
        return {name: self.subject.file.tensors[name].type.name for name in self.subject.tensors}

    def measured_kld(self, preset: Preset) -> float:
        """The KLD of a preset on the text that recipes are measured on, nats per token."""
        full = self.full_types()
        types = {name: preset.types[name] for name in full if preset.types[name] != full[name]}
        chunks = self.options.feedback.chunks
        return self.measurements().measure(types, chunks, f"preset {preset.name}").kld

    def plan(
        self,
        target: Target,
        prices: TypePrices,
        preset: Preset | None = None,
        rivals: Mapping[str, Mapping[str, str]] | None = None,
    ) -> PlanResult:
        """A recipe for a target.

        Parameters:
            target: a size or a KLD.
            prices: prices of types near the target.
            preset: the plan is not worse than this preset, as far as the text can tell.
            rivals: name → types of further recipes to compete with.

        Raises:
            BitladderError: no recipe meets the target and the constraints.
        """
        began = time.monotonic()
        if not self.options.measure:
            problem = self.build(prices.predicted())
            allocation = target.solve(problem)
            types, feedback, tokens = allocation.types, None, 0
        else:
            measurements, subject = self.measurements(), self.subject
            planned = PlanProblem(
                prices.predicted(), subject.places, target, self.build, self.full_types(), subject.tensor_bytes
            )
            others: dict[str, Mapping[str, str]] = {}
            if preset is not None:
                others[f"preset {preset.name}"] = {name: preset.types[name] for name in subject.tensors}
            loop = Feedback(planned, measurements, self.options.feedback)
            feedback = loop.run(others | dict(rivals or {}), self.progress)
            problem, allocation, types = feedback.problem, feedback.allocation, feedback.best.types
            tokens = measurements.tokens
            if target.max_kld is not None:
                refuse_unmet(target, feedback, self.full_types())
        whole, nbytes = self.subject.complete(self.full_types() | dict(types))
        return PlanResult(
            types=whole,
            bytes=nbytes,
            allocation=allocation,
            problem=problem,
            prices=prices,
            preset=preset,
            feedback=feedback,
            text=self.text.name,
            tokens=tokens,
            seconds=time.monotonic() - began,
        )


def refuse_unmet(target: Target, feedback: FeedbackResult, full: Mapping[str, str]) -> None:
    """Refuses a largest KLD that no recipe was measured to keep, or that leaves every tensor as it is.

    Raises BitladderError that says what can be had.
    """
    klds = [recipe.measured.kld for recipe in feedback.tried if recipe.types != full]
    if not klds or feedback.best.types == full:
        raise BitladderError(f"{target.text}: every tensor would stay as it is; give a larger --kld")
    if target.max_kld is not None and min(klds) > target.max_kld:
        tried = number_of(len(klds), "recipe")
        raise BitladderError(
            f"{target.text}: {tried} had more when measured, at least {min(klds):.3g} nats. Try --kld "
            f"{1.1 * min(klds):.2g}"
        )
