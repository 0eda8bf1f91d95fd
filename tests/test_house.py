"""The house rules that a machine can keep: who imports whom, lengths, docstrings, references."""

import ast

import pytest
from conftest import ROOT

CORE = {"model", "masks", "augment", "data"}
SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("lab/*.py")]
OURS = {path.stem for path in ROOT.glob("*.py")} | {"plumbing", "lab"}
NETWORK = {"model", "masks", "augment"}
MAY_IMPORT = {  # file or folder: what of ours it may import
    "model.py": NETWORK,
    "masks.py": NETWORK,
    "augment.py": NETWORK,
    "data.py": {"augment", "plumbing"},
    "pretrain.py": CORE | {"plumbing", "lab.report"},
    "finetune.py": CORE | {"plumbing", "lab.report"},
    "plumbing/weights.py": CORE | {"plumbing"},
    "plumbing": {"plumbing"},
}
name_of = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())


def imported(path):
    """Dotted names of our modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = [f"{module}.{alias.name}" for alias in node.names]
            names = inside if module in ("plumbing", "lab") else [module]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in OURS)


@name_of
def test_imports_point_downwards(path):
    file = path.relative_to(ROOT).as_posix()
    allowed = MAY_IMPORT.get(file) or MAY_IMPORT.get(file.split("/")[0])
    for name in imported(path) if allowed else ():
        assert name in allowed or name.split(".")[0] in allowed, f"{file} imports {name}"


@name_of
def test_functions_are_short_and_explained(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            limit = 90 if node.name == "main" else 40
            assert lines <= limit, f"{path.name}: {node.name} has {lines} lines"
    for node in tree.body:
        is_public = isinstance(node, ast.FunctionDef) and node.name[0] != "_"
        if is_public and node.name != "main":
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_no_line_is_longer_than_100_columns():
    for path in [*SCRIPTS, *ROOT.glob("tests/**/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.relative_to(ROOT)}:{number}"


def test_nothing_refers_to_files_outside_the_repository():
    outside = ("METHOD.md", "DATASETS.md", "MEASURED.md", "../shared")
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.*")]
    allowed = {ROOT / "tests" / "conftest.py", ROOT / "tests" / "test_house.py"}
    for path in {*SCRIPTS, *pages, *ROOT.glob("tests/**/*.py")} - allowed:
        for name in outside:
            assert name not in path.read_text(), f"{path.relative_to(ROOT)} names {name}"
