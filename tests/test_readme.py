import re

from conftest import ROOT

from envs.rendering import SYSTEM_PACKAGES


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
