"""Options exist once: a frozen dataclass per concern, whose fields carry help, limits and defaults.

The command line, the command that repeats a run, keys of results and the reference page follow from these fields.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar

from bitladder.errors import UsageError

KEY = "option"
Effort = Literal["fast", "normal", "high"]
T = TypeVar("T", bound="Options")


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field of `Options` says of itself.

    Parameters:
        help: one sentence for `--help`.
        flags: the spellings on the command line, the usual one first; none for what only Python can set.
        metavar: what stands for the value in `--help`.
        least: the smallest value, or None.
        most: the largest value, or None.
        decides: whether the value decides the result. A number of threads does not.
        names: what the value names ("model" is a file or an id of the hub). A card shows files without their folders,
            and the shell completes files and presets.
        writes: the kind of file that a path names for writing (`cli.outputs`), or what chooses it
            by all values; "folder" for a directory.
        unset: what None means, for `--help`.
        commas: whether one flag names all items of a tuple, separated by commas.
        closed: whether options nested here have no flags: only Python sets them.
        hidden: whether the command that repeats a run leaves it out.
        group: the heading of `--help` that it stands under; the class has one for fields without.
        efforts: other defaults, by effort (`Effort`).
    """

    help: str = ""
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    decides: bool = True
    names: Literal["file", "text", "tasks", "model", "preset", "ladder"] | None = None
    writes: str | Callable[[Mapping[str, Any]], str | None] | None = None
    unset: str | None = None
    commas: bool = False
    closed: bool = False
    hidden: bool = False
    group: str = ""
    efforts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def option(default: Any, *flags: str, **more: Any) -> Any:
    """A field of an `Options` class, with the parameters of `Option`. A class as default is made anew each
    time; `...` means that there is no default."""
    metadata = {KEY: Option(flags=flags, **more)}
    if default is ...:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
    """The base of all options. Raises UsageError that names the flag for a value outside its limits.

    `GROUP` is the heading of `--help` for the fields of a class; empty for "Options".
    """

    GROUP: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in table(type(self)):
            if not field.nested:
                field.check(getattr(self, field.name))

    def deciding(self) -> dict[str, Any]:
        """The values that decide a result, by name, for `keys.settled`."""
        return {field.name: getattr(self, field.name) for field in table(type(self)) if field.option.decides}

    def replace(self, **changes: Any) -> Self:
        """The same options but for some values, which are checked. A name may be that of a nested field."""
        parts: dict[str, Any] = {}
        for field in table(type(self)):
            if field.name in changes:
                parts[field.name] = changes.pop(field.name)
            elif field.nested is not None and not field.option.closed:
                names = _names(field.nested) & changes.keys()
                if names:
                    part = {name: changes.pop(name) for name in names}
                    parts[field.name] = getattr(self, field.name).replace(**part)
        if changes:
            raise TypeError(f"{type(self).__name__} has no option {min(changes)}")
        return dataclasses.replace(self, **parts)

    def at_effort(self, effort: str, keep: Container[str] = ()) -> Self:
        """The same options, but those that cost time have their values of an effort.

        Parameters:
            effort: "fast", "normal", which has the defaults, or "high".
            keep: names of fields that stay as they are.
        """
        changes: dict[str, Any] = {}
        for field in table(type(self)):
            if field.name == "effort":
                changes["effort"] = effort
            elif field.nested is not None:
                changes[field.name] = getattr(self, field.name).at_effort(effort, () if field.option.closed else keep)
            elif effort in field.option.efforts and field.name not in keep:
                changes[field.name] = field.option.efforts[effort]
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class OptionField:
    """A field of an `Options` class: its name, type (`item`) and default, and what it says of itself.

    `choices` are the words of a Literal. `many` is true for a tuple, whose items have the type `item`. `optional` is
    true where None is allowed. `nested` is the class of a field that is options itself. `group` is the heading that it
    stands under in `--help`.
    """

    name: str
    item: type
    default: Any
    option: Option
    choices: tuple[str, ...] = ()
    many: bool = False
    optional: bool = False
    nested: type[Options] | None = None
    group: str = ""

    @property
    def usual(self) -> str:
        """The long spelling of the flag; the name of the field where it has none."""
        flags = self.option.flags
        return next((flag for flag in flags if flag.startswith("--")), flags[0] if flags else self.name)

    @property
    def label(self) -> str:
        """The option as an error names it."""
        return self.usual.split("/")[0]

    def check(self, value: Any) -> None:
        """Raises UsageError if a value is not of the choices or outside the limits."""
        if value is None and self.optional:
            return
        option = self.option
        for item in value if self.many else (value,):
            if self.choices and item not in self.choices:
                raise UsageError(f"{self.label} is {item}; it must be one of {', '.join(self.choices)}")
            # Written so that NaN is refused.
            if option.least is not None and not item >= option.least:
                raise UsageError(f"{self.label} is {item}; it must be at least {option.least}")
            if option.most is not None and not item <= option.most:
                raise UsageError(f"{self.label} is {item}; it must be at most {option.most}")


_tables: dict[type[Options], tuple[OptionField, ...]] = {}


def table(options: type[Options]) -> tuple[OptionField, ...]:
    """The fields of an `Options` class in their order."""
    if options not in _tables:
        hints = typing.get_type_hints(options)
        _tables[options] = tuple(_field(options, field, hints[field.name]) for field in dataclasses.fields(options))
    return _tables[options]


def flat(options: type[Options]) -> Iterator[OptionField]:
    """The fields that have a flag, those of nested options too."""
    for field in table(options):
        if field.nested is not None:
            if not field.option.closed:
                yield from flat(field.nested)
        elif field.option.flags:
            yield field


def _names(options: type[Options]) -> set[str]:
    """The names of all fields, those of nested options too."""
    fields = table(options)
    inner = [_names(field.nested) for field in fields if field.nested is not None and not field.option.closed]
    return {field.name for field in fields}.union(*inner)


def build(options: type[T], values: dict[str, Any]) -> T:
    """Options from flat values by field name, as the command line gives them. A name that is missing has its default.

    Raises UsageError for a value outside its limits.
    """
    arguments: dict[str, Any] = {}
    for field in table(options):
        if field.name in values:
            arguments[field.name] = values[field.name]
        elif field.nested is not None and not field.option.closed:
            arguments[field.name] = build(field.nested, values)
    return options(**arguments)


def words(options: Options, shown: Mapping[str, Callable[[Any], Any]] | None = None) -> list[str]:
    """The flags and values of all fields that differ from their default, as words of a command line.

    `shown` turns a value into what may be shown of it, by what the field names ("file", "text", "tasks"). Defaults are
    those of the options' effort, if they have one.
    """
    parts: list[str] = []
    shown = shown or {}
    effort = getattr(options, "effort", "high")
    for field in flat(type(options)):
        value = _value(options, field)
        if value == field.option.efforts.get(effort, field.default) or field.option.hidden:
            continue
        flag = field.usual
        if field.item is bool and not field.many:
            yes, _, no = flag.partition("/")
            parts.append(yes if value else no)
            continue
        show = shown.get(field.option.names or "", str)
        if field.option.commas:
            value = ",".join(value)
        for item in value if field.many and not field.option.commas else (value,):
            parts += [flag, str(show(item))]
    return parts


def _value(options: Options, field: OptionField) -> Any:
    for own in table(type(options)):
        if own.nested is not None:
            if not own.option.closed and any(inner.name == field.name for inner in flat(own.nested)):
                return _value(getattr(options, own.name), field)
        elif own.name == field.name:
            return getattr(options, field.name)
    raise KeyError(field.name)


def _field(owner: type[Options], field: "dataclasses.Field[Any]", hint: Any) -> OptionField:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    about = field.metadata.get(KEY, Option())
    inner, optional = hint, False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = next(part for part in typing.get_args(hint) if part is not type(None))
        optional = True
    many = typing.get_origin(inner) is tuple
    if many:
        inner = typing.get_args(inner)[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(inner) is Literal:
        choices, inner = typing.get_args(inner), str
    nested = inner if isinstance(inner, type) and issubclass(inner, Options) else None
    kind = inner if isinstance(inner, type) else object
    return OptionField(field.name, kind, default, about, choices, many, optional, nested, about.group or owner.GROUP)
