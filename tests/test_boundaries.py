"""What the house forbids is checked here, and each check is shown to catch what it is for."""

import ast
import graphlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import grimp
import pytest

from tests.places import ROOT

PACKAGES = ("core", "pipelines", "serve")
LONGEST_FILE_LINES = {"core": 400, "pipelines": 400, "serve": 400, "tests": 500, "benchmarks": 500, "imprint.py": 400}
WORDS = "pipelines/world/lexicon.py"
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
RAY_SERVE_FILES = {"serve/app.py", "serve/router.py"}

Check = Callable[[str, ast.Module], Iterator[str]]


def _files(*tops: str) -> list[str]:
    """Python files under the named folders or files of the repository, as relative paths."""
    paths = [path for top in tops for path in ([ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py")))]
    return [path.relative_to(ROOT).as_posix() for path in paths if path.exists()]


def _ours() -> list[str]:
    return _files(*PACKAGES, "benchmarks", "imprint.py")


def _found(check: Check, files: list[str]) -> list[str]:
    assert files
    return [fault for file in files for fault in check(file, ast.parse((ROOT / file).read_text(), file))]


def _imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every absolute import and the full name it reaches: `from a.b import c` reaches a.b.c."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def _inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def _ray_serve_elsewhere(file: str, tree: ast.Module) -> Iterator[str]:
    if file in RAY_SERVE_FILES:
        return
    for node, name in _imports(tree):
        if _inside(name, "ray.serve"):
            yield f"{file}:{node.lineno} imports {name}: only {' and '.join(sorted(RAY_SERVE_FILES))} may"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "ray.serve":
            yield f"{file}:{node.lineno} reaches ray.serve: only {' and '.join(sorted(RAY_SERVE_FILES))} may"


def _plain_serve(file: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(_inside(alias.name, "serve") for alias in node.names):
            yield f"{file}:{node.lineno} imports serve plainly: write `from serve.x import y`"
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module == "serve":
            yield f"{file}:{node.lineno} imports from serve itself: write `from serve.x import y`"
        elif isinstance(node, ast.ImportFrom) and node.module == "ray" and ("serve", None) in _aliases(node):
            yield f"{file}:{node.lineno} shadows our serve: write `from ray import serve as rs`"


def _aliases(node: ast.ImportFrom) -> list[tuple[str, str | None]]:
    return [(alias.name, alias.asname) for alias in node.names]


def _unpickles(file: str, tree: ast.Module) -> Iterator[str]:
    for node, name in _imports(tree):
        if name == "pickle.UnpicklingError":
            continue
        if name.partition(".")[0] in PICKLES or name in ("torch.load", "numpy.load"):
            yield f"{file}:{node.lineno} imports {name}: nothing is unpickled"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if function == "torch.load" and keywords.get("weights_only") != "True":
            yield f"{file}:{node.lineno} calls torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False":
            yield f"{file}:{node.lineno} allows pickles"


def test_core_imports_without_ray() -> None:
    modules = [file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in _files("core")]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in {'ray', 'fastapi', 'starlette', 'uvicorn', 'deepspeed'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_ray_serve_only_in_app_and_router() -> None:
    assert _found(_ray_serve_elsewhere, _ours()) == []


def test_serve_is_never_imported_plainly() -> None:
    assert _found(_plain_serve, [*_ours(), *_files("tests")]) == []


def test_nothing_is_unpickled() -> None:
    assert _found(_unpickles, _ours()) == []


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (_ray_serve_elsewhere, "import ray.serve"),
        (_ray_serve_elsewhere, "from ray import serve as rs"),
        (_ray_serve_elsewhere, "from ray.serve.request_router import FIFOMixin"),
        (_ray_serve_elsewhere, "def run():\n    import ray\n    ray.serve.shutdown()"),
        (_plain_serve, "import serve"),
        (_plain_serve, "import json, serve.api as api"),
        (_plain_serve, "from serve import api"),
        (_plain_serve, "from ray import serve"),
        (_unpickles, "import pickle"),
        (_unpickles, "from pickle import loads"),
        (_unpickles, "from torch import load"),
        (_unpickles, "import torch\ntorch.load(path)"),
        (_unpickles, "import torch\ntorch.load(path, weights_only=trusted)"),
        (_unpickles, "import numpy as np\nnp.load(path, allow_pickle=True)"),
    ],
)
def test_checks_catch(check: Check, code: str) -> None:
    assert len(list(check("core/somewhere.py", ast.parse(code)))) == 1


@pytest.mark.parametrize(
    ("check", "file", "code"),
    [
        (_ray_serve_elsewhere, "serve/app.py", "from ray import serve as rs"),
        (
            _ray_serve_elsewhere,
            "pipelines/training/train.py",
            "import ray\nray.data.read_text(path)\nfrom serve.api import build",
        ),
        (_plain_serve, "serve/app.py", "from ray import serve as rs\nfrom serve.api import build\nimport server"),
        (
            _unpickles,
            "core/adapters/foreign_formats.py",
            "from pickle import UnpicklingError\ntorch.load(path, weights_only=True)",
        ),
    ],
)
def test_checks_let_pass(check: Check, file: str, code: str) -> None:
    assert list(check(file, ast.parse(code))) == []


def test_no_module_is_named_like_the_standard_library() -> None:
    parts = {part for file in [*_ours(), *_files("tests")] for part in Path(file).with_suffix("").parts} - {"__init__"}
    assert parts & sys.stdlib_module_names == set()


def test_files_are_short() -> None:
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in [*_ours(), *_files("tests")] if file != WORDS}
    assert {file: lines for file, lines in lengths.items() if lines > LONGEST_FILE_LINES[file.partition("/")[0]]} == {}


def test_no_file_imports_in_a_circle() -> None:
    """Type-checking imports and those inside of functions count, too."""
    graph = grimp.build_graph(*PACKAGES)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    graphlib.TopologicalSorter(imports).prepare()  # raises `CycleError`, which names the circle


def test_third_party_imports_are_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {_normal(re.split(r"[\[<>=~!; ]", line)[0]) for line in declared}
    owners = importlib.metadata.packages_distributions()
    undeclared = set()
    for file in _ours():
        for _, name in _imports(ast.parse((ROOT / file).read_text())):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in (*PACKAGES, "imprint", "benchmarks"):
                continue
            if names.isdisjoint(map(_normal, owners.get(top, []))):
                undeclared.add(f"{file} imports {top}")
    assert undeclared == set()


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def test_import_contracts_bite(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    faults = {
        "core/text/a.py": "import ray",
        "core/store/a.py": "import core.lift.a",
        "core/lift/a.py": "import benchmarks.speed",
        "pipelines/corpus/a.py": "import serve.a",
        "pipelines/world/a.py": "import pipelines.training",
        "serve/a.py": "",
    }
    for wing in [
        *PACKAGES,
        *(folder.relative_to(ROOT) for folder in sorted(ROOT.glob("[cp]*/*/")) if (folder / "__init__.py").exists()),
    ]:
        (tmp_path / wing).mkdir()
        (tmp_path / wing / "__init__.py").touch()
    for file in ROOT.glob("[cp]*/*.py"):
        (tmp_path / file.relative_to(ROOT)).touch()
    for file, code in faults.items():
        (tmp_path / file).write_text(code)
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "0 kept, 5 broken" in done.stdout, done.stdout


SKIPPING_TESTS = {
    "passes": "def test_it(): pass",
    "skips": "import pytest\ndef test_it(): pytest.skip('no reason')",
    "skips_marked": "import pytest\n@pytest.mark.skip\ndef test_it(): pass",
    "skips_module": "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass",
    "skips_slow": "import pytest\n@pytest.mark.slow\ndef test_it(): pytest.skip('no reason')",
}


@pytest.mark.parametrize(
    ("names", "ci", "expected"),
    [
        (["passes", "skips_slow"], "true", pytest.ExitCode.OK),
        (["passes", "skips"], "true", pytest.ExitCode.TESTS_FAILED),
        (["passes", "skips_marked"], "true", pytest.ExitCode.TESTS_FAILED),
        (["passes", "skips_module"], "true", pytest.ExitCode.TESTS_FAILED),
        (["passes", "skips"], "", pytest.ExitCode.OK),
    ],
)
def test_skipping_a_core_test_fails_ci(tmp_path: Path, names: list[str], ci: str, expected: pytest.ExitCode) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    for name in names:
        (tmp_path / f"test_{name}.py").write_text(SKIPPING_TESTS[name])
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-m", "", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"CI": ci}, capture_output=True, text=True)
    assert done.returncode == expected, done.stdout + done.stderr
    assert re.search(r"^=+ 1 passed, 1 skipped in [\d.]+s =+$", done.stdout, re.MULTILINE), done.stdout
    if expected == pytest.ExitCode.TESTS_FAILED:
        assert "neither slow nor gpu" in done.stdout
