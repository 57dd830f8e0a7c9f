#!/usr/bin/env bash
# Library:   ray 2.60.0, Ray Data (pyarrow 26.0.1, numpy 2.4.6)
# Behaviour: map_batches and iter_batches hand int64 columns out as numpy by default. One null in a batch turns the
#            whole batch into float64: other rows' ids above 2**53 are rounded, even where the function gives the
#            batch back as it came. Two ids can become one. Whether an id survives depends on which rows share its
#            batch; the pandas and pyarrow formats keep them.
# Guess:     A null shows as None (or a mask) in an object column; the other ids stay exact, or the batch is refused.
# Seen:      Ids 2**53, 2**53 + 1 and null through `lambda batch: batch`: 2**53 twice, as floats. Without the null:
#            both exact. With batch_format="pandas" or "pyarrow": exact, null stays null.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check 'ray[data]==2.60.0' pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled RAY_worker_niceness=0
venv/bin/python - <<'EOF'
import logging
import os
import sys

import pyarrow as pa
import ray

options = dict(include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=100 * 2**20)
ray.init(address="local", num_cpus=2, _temp_dir=f"{os.getcwd()}/ray", **options)
logging.getLogger("ray.data").setLevel("ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
table = pa.table({"id": pa.array([2**53, 2**53 + 1, None], pa.int64())})


def ids(table=table, **options):
    """What an identity makes of the ids; NaN as None."""
    rows = ray.data.from_arrow(table).map_batches(lambda batch: batch, **options).take_all()
    return [None if row["id"] != row["id"] else row["id"] for row in rows]


seen = {
    "default": ids(),
    "default, type": type(ids()[1]).__name__,
    "without the null": ids(table.slice(0, 2)),
    "pandas": ids(batch_format="pandas"),
    "pyarrow": ids(batch_format="pyarrow"),
}
ray.shutdown()
exact = [2**53, 2**53 + 1, None]
told = {
    "default": [2**53, 2**53, None],
    "default, type": "float",
    "without the null": exact[:2],
    "pandas": exact,
    "pyarrow": exact,
}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF
