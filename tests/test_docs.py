"""What the documents name is there: modules, classes, functions and files of docs/architecture.md and docs/names.md."""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

from anima_jax.data.preprocessors import KINDS

ROOT = pathlib.Path(__file__).parents[1]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTROL = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
RENAMED = (ROOT / "docs" / "names.md").read_text(encoding="utf-8").split("\n## Names that changed\n")[1]

IDENTIFIER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def members(nodes: list[ast.stmt]) -> dict[str, dict]:
    """Names that statements define, each with the names that it defines itself if it is a class."""
    found: dict[str, dict] = {}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            found[node.name] = members(node.body)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = {}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: {} for target in targets if isinstance(target, ast.Name)}
    return found


@functools.cache
def modules() -> dict[str, dict]:
    """Dotted name → members of every module and package."""
    found = {}
    for path in (path for package in ("anima_jax", "convert") for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = members(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def named(dotted: str) -> bool:
    """Whether a name, such as `step.TrainState.params` or `data.store`, is one of a module or of something in it."""
    parts = dotted.split(".")
    for length in range(len(parts) + 1):
        module, rest = ".".join(parts[:length]), parts[length:]
        for name, scope in modules().items():
            if not module or f".{name}".endswith(f".{module}"):
                for part in rest:
                    scope = scope.get(part)  # noqa: PLW2901
                    if scope is None:
                        break
                else:
                    if module or rest:
                        return True
    return False


def code(text: str) -> Iterator[str]:
    """What stands in backticks, fenced blocks left out."""
    return (token for token in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)))


def missing(tokens: Iterator[str]) -> list[str]:
    """Paths and identifiers among `tokens` that are not there; commands, flags and TOML tables are not looked up."""
    found = []
    for token in tokens:
        if re.fullmatch(r"[\w./]+/[\w./]*|\w+\.(py|toml|md)", token):
            there = any((folder / token).exists() for folder in (ROOT, ROOT / "anima_jax"))
        elif IDENTIFIER.fullmatch(token.removesuffix("()")):
            there = named(token.removesuffix("()"))
        else:
            there = True
        if not there:
            found.append(token)
    return found


def test_the_architecture_page_names_what_is_there():
    assert missing(code(ARCHITECTURE)) == []


def test_links_of_the_architecture_page_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:]+)\)", ARCHITECTURE)
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []


def anchors(page: pathlib.Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_control_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", CONTROL)
    pages = [(ROOT / "docs" / (target or "control.md"), anchor) for target, anchor in links]
    assert [str(page) for page, _ in pages if not page.exists()] == []
    assert [anchor for page, anchor in pages if anchor and anchor not in anchors(page)] == []


def test_the_control_page_lists_the_kinds_of_control_pictures_with_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*)\|", CONTROL, re.M)
    listed = {kind: dict(re.findall(r"`(\w+)` \((\d+)\)", options)) for kind, options in rows if kind in KINDS}
    assert listed == {
        kind: {name: str(number.default) for name, number in options.items()} for kind, (_, options) in KINDS.items()
    }


def test_the_new_names_of_what_was_renamed_are_there():
    rows = [line.strip("|").split(" | ") for line in RENAMED.splitlines() if line.startswith("| ") and "`" in line]
    assert [name for _, new in rows for name in missing(code(new))] == []
