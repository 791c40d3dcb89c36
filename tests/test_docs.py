"""The documentation: links that lead somewhere, and a command reference that has all that --help has."""

import pathlib
import re
import runpy

import pytest

from bitladder.cli import VERBS, invoke

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Made anew: whether docs/commands.md is up to date is for `make lint`.
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "docs.py"))["reference"]()


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as Python-Markdown and GitHub make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_has_all_that_help_has(verb, capsys):
    commands = [[verb]]
    assert invoke([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    if "Commands:" in shown:
        children = re.findall(r"^  ([a-z-]+) ", shown.split("Commands:")[1].split("Examples:")[0], re.MULTILINE)
        assert children
        commands += [[verb, child] for child in children]
    for command in commands:
        assert invoke([*command, "--help"]) == 0
        shown = capsys.readouterr().out
        name = "bitladder " + " ".join(command)
        section = re.split(r"^#+ (?=bitladder )", REFERENCE, flags=re.MULTILINE)
        (text,) = [part for part in section if part.splitlines()[0] == name]
        options = re.split(r"^[A-Z].*:$", shown, maxsplit=1, flags=re.MULTILINE)[1].split("\nCommands:")[0]
        for option in re.findall(r"^  (-[^ ,]+)", options, re.MULTILINE):
            if option not in ("--json", "-q", "-v", "-h"):
                assert re.search(rf"^- `[^`]*{re.escape(option)}\b", text, re.MULTILINE), f"{name}: {option}"


@pytest.mark.parametrize(
    "page", sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "commands.md")
)
def test_rung_and_kld_are_explained_where_they_are_first_used(page):
    """In a line with a link to the glossary, or below one."""
    text = re.sub(
        r"```.*?```|`[^`]*`", lambda match: re.sub(".", " ", match[0]), (ROOT / "docs" / page).read_text(), flags=re.S
    )
    use, link = re.search(r"\brungs?\b|\bKLD\b", text, re.IGNORECASE), text.find("glossary.md")
    if use is not None and page != "glossary.md":
        assert 0 <= text[: max(link, 0)].count("\n") <= text[: use.start()].count("\n") and link >= 0


def test_the_index_lists_all_pages():
    listed = set(re.findall(r"\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
