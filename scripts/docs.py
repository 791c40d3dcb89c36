"""Write docs/commands.md, the reference of all commands, from the command line itself.

`make docs` runs it. With --check, as in `make lint`, nothing is written: the page must be up to date, and every page
of docs/ must be in the site's navigation.
"""

import pathlib
import re
import sys
from collections.abc import Iterator

import click

from bitladder.cli import VERBS, application
from bitladder.cli.typed import HelpfulCommand

ROOT = pathlib.Path(__file__).parents[1]
PAGE, SITE = ROOT / "docs" / "commands.md", ROOT / "zensical.toml"
HEAD = """\
# Commands

<!-- Made from the command line by scripts/docs.py; `make docs` writes it again. -->

Data goes to stdout, messages and progress to stderr. Exit codes: 0 done, 1 an error, 2 a wrong option, 130 interrupted,
143 terminated.

No command overwrites a file that it reads, by whatever path, or a file of another kind than it writes. It replaces
files of its own kind. `--force` replaces a file of another kind too. `imatrix` and `calibrate` may add to a file
(`--in-file` and `-o` name the same one), and the model of `run` may lie in its directory.
"""
# Options of all commands, said once.
COMMON = ("as_json", "quiet", "verbose", "help")


def reference() -> str:
    """The whole page."""
    context = click.Context(application, info_name="bitladder", **application.context_settings)
    parts = [
        HEAD,
        "\n".join(f"- [`bitladder {verb}`](#bitladder-{verb}): {said}" for verb, said in VERBS.items()) + "\n",
    ]
    first = application.get_command(context, next(iter(VERBS)))
    assert first is not None
    common = [option for option in first.params if option.name in COMMON]
    parts.append("All commands take:\n\n" + "\n".join(describe(option) for option in common) + "\n")
    for verb in VERBS:
        command = application.get_command(context, verb)
        assert command is not None
        parts += sections(command, f"bitladder {verb}", 2, context)
    return "\n".join(parts)


def sections(command: click.Command, name: str, level: int, parent: click.Context) -> Iterator[str]:
    """A command's section, and those of its own commands."""
    # With a parent it has the same options for help as on the command line; click remembers them.
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [f"{'#' * level} {name}\n", f"```\n{usage}\n```\n", f"{paragraphs(command.help or '')}\n"]
    if isinstance(command, HelpfulCommand):
        shown = "\n".join(f"bitladder {example}" for example in command.examples)
        lines.append(f"```\n{shown}\n```\n\nMore: [{command.page}]({command.page})\n")
    groups: dict[str, list[str]] = {"": []}
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in COMMON:
            groups.setdefault(getattr(option, "group", ""), []).append(describe(option))
    for title, bullets in groups.items():
        if bullets:
            lines.append((f"{title}:\n\n" if title else "") + "\n".join(bullets) + "\n")
    yield "\n".join(lines)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from sections(found, f"{name} {child}", level + 1, context)


def describe(option: click.Parameter) -> str:
    """A bullet: the option's names and value, what it does, its range and default."""
    assert isinstance(option, click.Option)
    names = ", ".join(option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(option.secondary_opts)
    value = "" if option.is_flag or option.count else " " + (option.metavar or kind_of(option.type))
    said = " ".join((option.help or "").split())
    extra = [text for text in (bounds(option.type), shown_default(option)) if text]
    if match := re.search(r"\s*\[(default: .*)\]$", said):
        said, extra = said[: match.start()], [*extra, match[1]]
    if option.required:
        extra.append("required")
    if option.multiple and "repeated" not in said:
        extra.append("may be repeated")
    more = f"({escaped('; '.join(extra))})" if extra else ""
    return f"- `{names}{value}`: " + " ".join(part for part in (escaped(said), more) if part)


def kind_of(kind: click.ParamType) -> str:
    """What stands for an option's value."""
    if isinstance(kind, click.Choice):
        return "|".join(str(choice) for choice in kind.choices)
    if isinstance(kind, click.Path):
        return "PATH" if kind.file_okay and kind.dir_okay else "FILE" if kind.file_okay else "DIR"
    if isinstance(kind, click.Tuple):
        return " ".join(kind_of(one) for one in kind.types)
    return {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}.get(kind.name, kind.name.upper())


def bounds(kind: click.ParamType) -> str:
    """The range of a number; empty if it has none."""
    if not isinstance(kind, click.IntRange | click.FloatRange):
        return ""
    low, high = kind.min, kind.max
    if low is not None and high is not None:
        return f"{low} to {high}"
    return f"at least {low}" if low is not None else f"at most {high}" if high is not None else ""


def shown_default(option: click.Option) -> str:
    """The default, if the help shows it and does not say it itself."""
    value = option.default
    if not option.show_default or value is None or (option.help and "[default:" in option.help):
        return ""
    if option.is_flag and option.secondary_opts:
        value = (option.opts if value else option.secondary_opts)[0].lstrip("-")
    if isinstance(value, tuple | list):
        value = ", ".join(map(str, value))
    return f"default: {value}"


def paragraphs(text: str) -> str:
    """Help text as Markdown: paragraphs, with those after \\b as they are."""
    parts = []
    for part in re.split(r"\n\s*\n", text.strip()):
        if part.lstrip().startswith("\b"):
            parts.append("```\n" + part.replace("\b", "").strip("\n") + "\n```")
        else:
            parts.append(" ".join(escaped(part).split()))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Text whose characters mean nothing to Markdown or HTML."""
    return re.sub(r"([*_<>\\\[\]])", r"\\\1", text)


def missing_pages() -> list[str]:
    """Pages that the navigation does not have."""
    listed = set(re.findall(r'= "([^"]+\.md)"', SITE.read_text(encoding="utf-8")))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    return sorted(pages - listed)


def main() -> int:
    """Write the page, or say what is not as it should be."""
    text = reference()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    wrong = [f"docs/{page} is not in the navigation: add it to {SITE.name}" for page in missing_pages()]
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        wrong.append(f"docs/{PAGE.name} is not what the command line says: run `make docs`")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
