"""The model of a plan: a full-precision file, its importance, what the library allows for each tensor, and constraints.

Prices and constraints make a problem for the solver.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import Imatrix, read_imatrix
from bitladder.engine import Request, TensorType, all_types, preset_types, storable, type_by_name
from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.files import Closing, sha256_file
from bitladder.gguf import TensorPlan, block_of, kind_of, open_model, padded, prediction_tensors
from bitladder.plan.allocate.problem import Problem, TypeOption
from bitladder.plan.options import Constraints
from bitladder.progress import SILENT
from bitladder.quantize import AS_PRESET, LADDERS, QuantizeOptions, prepare
from bitladder.recipe import changeable, exact_patterns, match_patterns, parse_tensor_type, target_type

Floats = npt.NDArray[np.float32]
Prices = Mapping[str, Mapping[str, float]]  # tensor → type → nats per token


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset by itself.

    Parameters:
        name: as the user wrote it.
        types: tensor → type, for every tensor of the file.
        bytes: size of the file that `bitladder quantize` writes: llama-quantize's, and the key of our version.
    """

    name: str
    types: dict[str, str]
    bytes: int


class Subject(Closing):
    """A model to plan for.

    Parameters:
        path: a full-precision GGUF.
        imatrix: the importance matrix of the same model, or None.
        unreached_type: the type of prediction heads, which no text reaches.

    Attributes:
        tensors: names of the tensors that can be planned, in the order of the file.
        unreached: names of further tensors that can be quantized, which no calibration text reached.
        importance: tensor → mean squared inputs, float32, shape [matrices, width].
        places: tensor → (kind, layer); the layer is None outside of blocks.

    Raises:
        BitladderError: the file is not a full-precision model, or the imatrix belongs to another one.
        UsageError: there is no such type.
    """

    def __init__(self, path: pathlib.Path, imatrix: pathlib.Path | None, unreached_type: str = "q8_0") -> None:
        if unreached_type == AS_PRESET:
            raise UsageError(f"--unreached-type {AS_PRESET}: a plan has no preset that gives a type; name a type")
        target_type(unreached_type, "--unreached-type")
        self.path, self.imatrix_path, self._unreached_type = path, imatrix, unreached_type
        self.imatrix: Imatrix | None = read_imatrix(imatrix) if imatrix is not None else None
        self.imatrix_sha256 = sha256_file(imatrix) if imatrix is not None else None
        self.file = open_model(path)
        self._needy: dict[str, set[str]] = {}
        try:
            changeable = self._changeable()
            self.importance = self._importances(changeable)
            heads = set(prediction_tensors(self.file))
            self.unreached = [
                name
                for name in changeable
                if name not in self.importance
                and (name in heads or (self.imatrix is not None and block_of(name) is not None))
            ]
            self.tensors = [name for name in changeable if name not in set(self.unreached)]
            if not self.tensors:
                raise BitladderError(f"the imatrix {imatrix} knows no tensor of {path} that can be planned")
        except BaseException:
            self.file.close()
            raise
        self.places = {name: (kind_of(name), block_of(name)) for name in self.tensors}

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _changeable(self) -> list[str]:
        can_change = changeable(self.file)
        names = [name for name in self.file.tensors if name in can_change]
        quantized = [name for name in names if self.file.tensors[name].type.quantized]
        if quantized:
            raise BitladderError(
                f"{self.path}: {quantized[0]} is {self.file.tensors[quantized[0]].type.name} already; "
                "plan for an F16, BF16 or F32 model"
            )
        if not names:
            raise BitladderError(f"{self.path} has no tensor that can be quantized")
        return names

    def _importances(self, names: Sequence[str]) -> dict[str, Floats]:
        matrix = self.imatrix
        if matrix is None:
            return {}
        if not matrix.entries.keys() & self.file.tensors.keys():
            raise BitladderError(f"the imatrix {self.imatrix_path} belongs to another model: no tensor is in both")
        importance = {name: matrix.columns(name, self.file.tensors[name]) for name in names}
        return {name: columns for name, columns in importance.items() if columns is not None}

    def needy(self, name: str) -> set[str]:
        """Names of the types that the library refuses for a tensor without importance; none if it has importance.

        Within the blocks the rule depends on the type alone. For embeddings and head it may be another.
        """
        if name in self.importance:
            return set()
        place = name if self.places[name][1] is None else "blocks"
        if place not in self._needy:
            self._needy[place] = {kind.name for kind in all_types().values() if self._refused(name, kind)}
        return self._needy[place]

    def _refused(self, name: str, kind: TensorType) -> bool:
        if not (kind.quantized and storable(kind)) or self.file.tensors[name].width % kind.block:
            return False
        request = Request("Q8_0", overrides=(*exact_patterns({name: kind}), (".*", type_by_name("q8_0"))))
        return preset_types(self.path, request).needs_imatrix

    def preset(self, name: str) -> Preset:
        """The types and size that llama-quantize gives the model. Raises BitladderError for a preset it cannot make."""
        options = QuantizeOptions(name, unreached_type=self._unreached_type)
        with prepare(self.path, options, imatrix=self.imatrix_path, progress=SILENT) as prepared:
            return Preset(name, prepared.choice.types, prepared.bytes)

    def fitting_preset(self, max_bytes: int) -> Preset | None:
        """The largest preset of the named ladders whose file is not above a size; None if every file is."""
        fitting = None
        for name in {name for ladder in LADDERS.values() for name in ladder}:
            try:
                preset = self.preset(name)
            except BitladderError:
                continue
            if preset.bytes <= max_bytes and (fitting is None or (preset.bytes, name) > (fitting.bytes, fitting.name)):
                fitting = preset
        return fitting

    def complete(self, types: Mapping[str, str]) -> tuple[dict[str, str], int]:
        """The type of every tensor of the file, and the exact size of what `bitladder quantize --recipe` writes.

        Tensors that are not planned get Q8_0 if they can be quantized, and prediction heads the type of
        `unreached_type`.
        """
        options = QuantizeOptions(types=dict(types), preset="Q8_0", unreached_type=self._unreached_type)
        with prepare(self.path, options, imatrix=self.imatrix_path, progress=SILENT) as prepared:
            return prepared.choice.types, prepared.bytes

    def overhead(self) -> int:
        """Bytes of a planned file outside of the tensors that get a type: header, padding, norms, unreached heads."""
        types, nbytes = self._in_eight_bits
        return nbytes - sum(self.tensor_bytes(name, types[name]) for name in self.tensors)

    def header_bytes(self) -> int:
        """Bytes of a planned file that are no weights: header and padding."""
        types, _ = self._in_eight_bits
        planned = set(self.tensors)
        return self.overhead() - sum(self.plain_bytes(name, types[name]) for name in types if name not in planned)

    @functools.cached_property
    def _in_eight_bits(self) -> tuple[dict[str, str], int]:
        """As `complete`, with Q8_0 for every tensor whose width can hold it."""
        block = type_by_name("q8_0").block
        stored = {name: self.file.tensors[name] for name in self.tensors}
        return self.complete({name: t.type.name if t.width % block else "q8_0" for name, t in stored.items()})

    def tensor_bytes(self, name: str, kind: str) -> int:
        """Bytes of a tensor in the file, padding included."""
        return padded(self.plain_bytes(name, kind))

    def plain_bytes(self, name: str, kind: str) -> int:
        """A tensor's bytes without padding."""
        return TensorPlan(name, self.file.tensors[name].shape, type_by_name(kind)).nbytes

    def weights(self) -> int:
        """Number of weights of the model, norms included."""
        return sum(tensor.elements for tensor in self.file.tensors.values())


def limits_of(subject: Subject, constraints: Constraints) -> Problem:
    """A problem without menus: fixed bytes and constraints.

    Raises UsageError for constraints that cannot be read, or that name what the model does not have.
    """
    return Problem(
        {},
        fixed_bytes=subject.overhead(),
        pins=pinned(subject, constraints.pins),
        floors=floored(subject, constraints.floors),
        ties=tied(subject, constraints.ties),
        max_types=constraints.max_types,
        max_seconds=None if constraints.min_speed is None else 1 / constraints.min_speed,
    )


def menus_of(
    subject: Subject, prices: Prices, speeds: Mapping[str, float] | None = None
) -> dict[str, tuple[TypeOption, ...]]:
    """Every tensor's menu: its priced types, and its full precision, which costs no KLD.

    Parameters:
        subject: the model.
        prices: tensor → type → nats per token.
        speeds: type → bytes per second, for the predicted time to read a tensor; None for no time.
    """
    speeds = speeds or {}
    menus: dict[str, tuple[TypeOption, ...]] = {}
    for name in subject.tensors:
        costs = {**prices.get(name, {}), subject.file.tensors[name].type.name: 0.0}
        options = []
        for kind, cost in costs.items():
            nbytes = subject.tensor_bytes(name, kind)
            seconds = nbytes / speeds[kind] if kind in speeds else 0.0
            options.append(TypeOption(kind, nbytes, cost, seconds, type_by_name(kind).bpw))
        menus[name] = tuple(options)
    return menus


def pinned(subject: Subject, pins: Iterable[str]) -> dict[str, str]:
    """Tensor → type, of PATTERN=TYPE as for --tensor-type.

    Raises UsageError for a pattern that matches no tensor, or a type that a width cannot hold.
    """
    types: dict[str, str] = {}
    pairs = tuple(parse_tensor_type(text) for text in pins)
    for match in match_patterns(subject.path, pairs, subject.tensors):
        for name in match.first:
            width = subject.file.tensors[name].width
            if width % match.type.block:
                raise UsageError(
                    f"--tensor-type {match.pattern}={match.type.name}: rows of {width} weights of {name} cannot be "
                    f"{match.type.name} (blocks of {match.type.block})"
                )
            types[name] = match.type.name
    return types


def floored(subject: Subject, floors: Iterable[str]) -> dict[str, float]:
    """Tensor → fewest bits per weight, of KIND=TYPE or KIND=BITS.

    Raises UsageError for a kind that the model does not have, or a floor that is neither a type nor a number.
    """
    floor: dict[str, float] = {}
    kinds = _kinds(subject)
    for text in floors:
        kind, equals, value = text.partition("=")
        if not (kind and equals and value):
            raise UsageError(f"--floor {text}: write KIND=TYPE or KIND=BITS, such as attn_v=q5_K or ffn_down=4.5")
        if kind not in kinds:
            close = did_you_mean(kind, sorted(kinds), "it has")
            raise UsageError(f"--floor {text}: the model has no such kind{close}")
        bpw = _floor_bpw(text, value)
        floor |= {name: bpw for name, (own, _) in subject.places.items() if own == kind}
    return floor


def tied(subject: Subject, ties: Iterable[str]) -> tuple[frozenset[str], ...]:
    """Sets of tensors that need equal types, of KIND,KIND. Raises UsageError for a kind that is not in the model."""
    kinds = _kinds(subject)
    sets: list[frozenset[str]] = []
    for text in ties:
        tie = [kind.strip() for kind in text.split(",")]
        unknown = [kind for kind in tie if kind not in kinds]
        if unknown:
            close = did_you_mean(unknown[0], sorted(kinds), "the model has")
            raise UsageError(f"--tie {text}: no kind {unknown[0]}{close}")
        for layer in {layer for _, layer in subject.places.values()}:
            members = frozenset(name for name, (kind, at) in subject.places.items() if kind in tie and at == layer)
            if len(members) > 1:
                sets.append(members)
    return tuple(sets)


def _kinds(subject: Subject) -> set[str]:
    return {kind for kind, _ in subject.places.values()}


def _floor_bpw(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return target_type(value, f"--floor {text}").bpw
