"""What `imprint store` may import: a listing waits for no torch, and only `core.store`'s own faces are used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from core.store.store import Store
from tests.places import ROOT
from tests.stores import adapter, document

HEAVY = {"botocore", "fsspec", "pandas", "ray", "torch", "transformers"}
FACES = {
    "core.store.answering",
    "core.store.errors",
    "core.store.manifest",
    "core.store.store",
    "core.store.upkeep.keeper",
    "core.store.upkeep.results",
}
COMMANDS = (
    ["ls", "{store}", "--tenant", "tenant"],
    ["ls", "{store}", "--tenant", "tenant", "--json"],
    ["show", "{store}", "one", "--tenant", "tenant", "--collection", "c"],
    ["show", "{store}", "one", "--tenant", "tenant", "--collection", "c", "--text"],
    ["stats", "{store}"],
    ["diff", "{store}@1", "{store}"],
    ["gc", "{store}", "--dry-run"],
)
CODE = """
import json, sys
from typer.testing import CliRunner
import imprint
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(imprint.app, ["store", *command])
    assert done.exit_code == 0, (command, done.output, done.exception)
    assert "one" in done.output or command[0] in ("stats", "gc"), (command, done.output)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_a_listing_imports_no_torch(tmp_path: Path) -> None:
    """Every command that reads the manifest alone, over several parts, with live, edited and deleted rows."""
    store, one = Store.open(tmp_path, create=True), document("the one text", name="one")
    store.put([one, document("two", name="two")], [adapter(one)])
    store.put([document("two, edited", name="two"), document("three", name="three")])
    store.delete_document("tenant", "c", "three")
    commands = [[word.format(store=tmp_path) for word in command] for command in COMMANDS]
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout))
    assert {"pyarrow", "typer", "core"} <= imported
    assert imported & HEAVY == set()


def test_the_commands_use_no_inner_part_of_the_store() -> None:
    files = sorted((ROOT / "pipelines" / "store").glob("*.py"))
    inner = [
        f"{file.name}:{node.lineno} {node.module}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("core.store") and node.module not in FACES
    ]
    assert files and inner == []
