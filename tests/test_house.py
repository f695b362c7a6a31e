"""The code base stays in order: sizes of files, functions and tests, no side effects at import, no retired names.

The layers of the packages are import-linter's (`lint-imports`), declared dependencies deptry's, dead code vulture's:
their settings are in pyproject.toml, and `.ci/run` runs them.
"""

import ast
import collections
import pathlib
import re
import tomllib
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).parents[1]
PRODUCT = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in ("anima_jax", "convert", "make_assets")
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""Path → text of every module that is installed."""

TESTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))
}

FILE_LINES = 450
FUNCTION_LINES = 60
ASSERTIONS = 6
"""How many things a test may check: one that checks more does not say in its name what it proves."""

REASON = "One function:"
"""How the docstring of a function that is too long or too complex begins its reason."""

MAINS = {
    "anima_jax/train.py",
    "anima_jax/generate.py",
    "anima_jax/convert/__main__.py",
    "anima_jax/convert/__init__.py",
}
"""What a command runs. `anima_jax/convert/__init__.py` sets a variable that numpy reads when it is imported."""

SIDE_EFFECT = re.compile(
    r"atexit\.register|warnings\.(filterwarnings|simplefilter)|\.(addFilter|addHandler|setLevel)$|logging\.basicConfig"
    r"|signal\.signal|faulthandler\.|os\.register_at_fork|os\.(environ\.(setdefault|update)|putenv)|config\.update"
    r"|subprocess\.|\.start$"
)
"""Functions that change the process: they are for functions that a main calls."""

GLOBAL_STATE = re.compile(r"(sys|threading)\.\w*hook|os\.environ\b")
"""What an assignment at import must not change."""

UNIX_ONLY = {"fcntl", "pwd", "grp", "resource", "termios"}

RETIRED = {
    *("Trained", "Work", "Rows", "Kept", "Guided", "Watch", "Picture", "Settings", "Layout", "Lines", "Kind"),
    *("Facts", "Agreement", "PatientFile", "Memo", "works", "facts", "told", "remarks"),
    *("everywhere", "put_whole", "put_rows", "put_batch", "over_batch", "check_alike", "is_alone"),
    *("from_first", "one_run", "compute_copy", "deviation", "first_arrays", "not_yet", "anew", "fault", "faults"),
}
"""Names that engineers had to ask about; docs/names.md has those that took their place."""

VAGUE = {"utils", "util", "helpers", "misc", "common", "words", "faults", "foreign", "sections", "watching"}
"""Modules that would not say what they contain, and those that were renamed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines of a function from `def` to its end, without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def oversized(text: str) -> list[str]:
    """Functions that are longer or, by ruff's measure, more complex than allowed, and do not say why."""
    lines, found = text.splitlines(), []
    for function in functions(ast.parse(text)):
        signature = lines[function.lineno - 1 : function.body[0].lineno]
        silenced = any(re.search(r"# noqa:.*\b(C901|PLR091[1245])\b", line) for line in signature)
        unexplained = REASON not in (ast.get_docstring(function) or "")
        if unexplained and (silenced or body_lines(function) > FUNCTION_LINES):
            found.append(f"{function.name}: {body_lines(function)} lines")
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when a module is imported: no bodies of functions, no `if __name__ == "__main__"`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            yield from getattr(child, "decorator_list", ())
        elif not (isinstance(child, ast.If) and "__main__" in ast.unparse(child.test)):
            yield child
            yield from at_import(child)


def side_effects(text: str) -> list[str]:
    """Statements that change the process when a module is imported."""
    found = {}
    for node in at_import(ast.parse(text)):
        if isinstance(node, ast.Call):
            changes = SIDE_EFFECT.search(ast.unparse(node.func))
        elif isinstance(node, ast.Attribute):  # a decorator such as @atexit.register
            changes = isinstance(node.ctx, ast.Load) and SIDE_EFFECT.search(ast.unparse(node))
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            changes = any(GLOBAL_STATE.match(ast.unparse(target)) for target in targets)
        else:
            changes = False
        if changes:
            found[node.lineno] = f"line {node.lineno}: {ast.unparse(node)}"
    return list(found.values())


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Names that code gives: of classes, functions, parameters, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | Function):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def assertions(function: Function) -> int:
    """Return how many `assert` statements and calls of `np.testing.assert_…` a test has."""
    calls = (ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call))
    statements = sum(isinstance(node, ast.Assert) for node in ast.walk(function))
    return statements + sum(".testing.assert_" in call for call in calls)


def test_no_file_is_too_long():
    assert {path: lines for path, text in PRODUCT.items() if (lines := len(text.splitlines())) > FILE_LINES} == {}


def test_a_long_or_complex_function_gives_its_reason():
    assert {path: found for path, text in PRODUCT.items() if (found := oversized(text))} == {}


def test_importing_a_module_changes_nothing_in_the_process():
    libraries = {path: text for path, text in PRODUCT.items() if path not in MAINS}
    assert {path: found for path, text in libraries.items() if (found := side_effects(text))} == {}


def test_modules_of_one_operating_system_are_imported_where_they_are_used():
    found = {path: imported(at_import(ast.parse(text))) & UNIX_ONLY for path, text in PRODUCT.items()}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_retired_names_do_not_come_back():
    found = {
        path: {name.lstrip("_") for name in defined_names(ast.parse(text))} & RETIRED for path, text in PRODUCT.items()
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_modules_say_what_they_contain():
    assert [path for path in PRODUCT if pathlib.Path(path).stem in VAGUE] == []


def test_every_name_that_vulture_ignores_still_exists():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["vulture"]
    assert set(settings["ignore_names"]) <= {
        name for text in PRODUCT.values() for name in defined_names(ast.parse(text))
    }


def test_no_two_classes_have_the_same_name():
    homes = collections.defaultdict(list)
    for path, text in PRODUCT.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path)
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_test_checks_too_many_things():
    found = {
        f"{path}::{function.name}": count
        for path, text in TESTS.items()
        for function in functions(ast.parse(text))
        if function.name.startswith("test_") and (count := assertions(function)) > ASSERTIONS
    }
    assert found == {}
