"""What keeps the code readable: short functions, and a common/ that knows no task."""

import ast

import pytest
from conftest import ROOT

SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("baselines/*.py")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_function_is_longer_than_two_screens(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 95, f"{path.name}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", ROOT.glob("common/*.py"), ids=lambda path: path.name)
def test_common_imports_no_script_environment_or_demonstration(path):
    own = {path.stem for path in ROOT.glob("*.py")} | {"envs", "demos", "baselines", "benchmark"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert not imported & own
