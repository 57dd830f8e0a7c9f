#!/usr/bin/env bash
# Library:   safetensors 0.8.0
# Behaviour: Saving the same tensors with the same metadata twice gives different bytes, even in one process: the
#            header holds the metadata in an order that is drawn anew each time. With no metadata or one entry the
#            bytes are the same. So a digest of the file, a layer of an image or a cache keyed by content changes
#            though nothing has.
# Guess:     The same call gives the same bytes: the format has nothing that could differ, and tensors are put into a
#            fixed order.
# Seen:      Twenty saves with eight entries: more than one digest (about twenty). None or one entry: one digest. All
#            load equal.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

venv/bin/python - <<'EOF'
import hashlib
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, save, save_file

tensors = {"b": np.arange(4.0), "a": np.ones((2, 3), np.float16)}


def digests(metadata):
    return len({hashlib.sha256(save(tensors, metadata)).hexdigest() for _ in range(20)})


eight = {f"key{number}": str(number) for number in range(8)}
save_file(tensors, "saved.safetensors", eight)
with safe_open("saved.safetensors", "numpy") as file:
    metadata = file.metadata()
loaded = [load(save(tensors, eight)) for _ in range(20)]
seen = {
    "none": digests(None),
    "one entry": digests({"key": "value"}),
    "eight entries differ": digests(eight) > 1,
    "same content": metadata == eight and all(np.array_equal(some[name], tensors[name]) for some in loaded for name in tensors),
}
told = {"none": 1, "one entry": 1, "eight entries differ": True, "same content": True}
print("as told" if seen == told else "CHANGED", seen, f"({digests(eight)} digests of 20)")
sys.exit(seen != told)
EOF
