"""What the project keeps to: short functions, a common/ that knows no task, a CI that runs the README's
test, and runs that survive a kill (a small part of tests/kills.py)."""

import ast
import random
import re

import kills
import pytest
from conftest import ROOT

from envs.rendering import SYSTEM_PACKAGES

FOLDERS = "", "common/", "envs/", "demos/", "baselines/", "benchmark/"
SCRIPTS = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}*.py")]


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


def readme_lines():
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Test\n(.*?)(?=^## |\Z)", readme, re.M | re.S).group(1)
    block = re.search(r"^```bash\n(.*?)^```", section, re.M | re.S).group(1)
    lines = [line.strip() for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def ci_lines(*skip):
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "set ", "cd ", *skip))]


def commands(lines):
    return [part.strip() for line in lines for part in line.split("&&")]


def test_ci_runs_the_readme_test_section_and_nothing_else():
    assert commands(ci_lines("if ! ldconfig")) == commands(readme_lines())


def test_ci_installs_the_system_packages_that_the_readme_and_the_error_message_name():
    (line,) = [line for line in ci_lines() if "apt-get install" in line]
    packages = line.partition("-qq lib")[2].partition(";")[0]
    assert SYSTEM_PACKAGES == f"lib{packages}"
    assert f"apt-get install {SYSTEM_PACKAGES}" in (ROOT / "README.md").read_text()


def test_run_of_which_a_process_was_killed_goes_on_from_its_checkpoint(tmp_path, tiny_base, monkeypatch):
    script, flags = kills.RUNS["torchrun"]
    monkeypatch.setitem(kills.RUNS, "torchrun", (script, f"{flags} --base {tiny_base}"))
    saved = "*/checkpoint1.[5-8].pt"
    phases = kills.kill_and_resume("torchrun", 1, tmp_path, None, random.Random(1), file=saved)
    assert {*phases} <= {"iterations", "saving"}
