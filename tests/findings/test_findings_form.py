"""Findings keep the form that findings/README.md asks for. Their packages are not installed here, so nothing is run."""

import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
FIELDS = ["Library", "Behaviour", "Guess", "Seen"]


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_a_finding_is_a_script_that_bash_can_read(script: Path) -> None:
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert script.stat().st_mode & 0o111 == 0o111
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_its_header_says_what_was_expected_and_seen(script: Path) -> None:
    header = re.match(r"#!.*\n((?:#.*\n)+)", script.read_text())
    assert header
    lines = header[1].splitlines()
    assert [found[1] for line in lines if (found := re.match(r"# ([A-Z][a-z]+): +\S", line))] == FIELDS
    assert re.search(r"\d+\.\d+\.\d+", lines[0])  # the library's version


def test_it_stops_at_errors_and_leaves_nothing_behind(script: Path) -> None:
    text = script.read_text()
    assert re.search(r'\nset -euo pipefail\nfolder=\$\(mktemp -d\)\ntrap \'rm -rf "\$folder"\' EXIT\ncd "\$folder"', text)


def test_it_installs_exact_versions_of_packages_alone(script: Path) -> None:
    installs = re.findall(r"pip (?:install|download) (.+)", script.read_text())
    assert installs
    for arguments in installs:
        packages = [word.strip("'\"") for word in arguments.split() if not word.startswith("-")]
        assert packages and all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", package) for package in packages), packages
    headed = script.read_text().partition("# Behaviour:")[0]
    pinned = dict(re.findall(r"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)", " ".join(installs)))
    assert any(f"{name} {version}" in headed for name, version in pinned.items())


def test_it_runs_without_the_product(script: Path) -> None:
    assert not re.search(r"^\s*(from|import) (core|pipelines|serve|imprint|benchmarks|tests)\b", script.read_text(), re.M)
    assert "unset PYTHONPATH" in script.read_text()


def test_it_fails_where_the_library_has_changed(script: Path) -> None:
    assert re.search(
        r'print\("as told" if seen == told else "CHANGED", seen.*\)\n(?:.*\n)?sys\.exit\(seen != told\)\n', script.read_text()
    )


def test_the_readme_has_a_line_for_each() -> None:
    listed = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)\.sh\) \|", (FOLDER / "README.md").read_text(), re.M)
    assert [name for name, _ in listed] == [target for _, target in listed] == [script.stem for script in SCRIPTS]
    assert len(SCRIPTS) >= 8
