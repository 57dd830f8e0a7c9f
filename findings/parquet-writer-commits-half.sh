#!/usr/bin/env bash
# Library:   pyarrow 26.0.1 with s3fs 2026.9.0 (against moto 5.2.5)
# Behaviour: An exception inside `with fs.open(...)` and `with ParquetWriter(...)` does not throw the unfinished
#            table away. The writer puts a footer behind the rows so far, the file completes its upload, and the good
#            object that stood there before is replaced by a shorter table that reads without a complaint. pyarrow's
#            own S3FileSystem does the same.
# Guess:     Object storage is all or nothing: a with-block that ends in an exception aborts the upload, the old
#            object stays.
# Seen:      Old table of 3 rows, a writer that fails after 1 of 3: the object holds 1 row and reads well, with s3fs
#            and with pyarrow's S3FileSystem. In `with fs.transaction` of s3fs the old 3 rows stay.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check pyarrow==26.0.1 s3fs==2026.9.0 'moto[server]==5.2.5'

export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
venv/bin/python - <<'EOF'
import logging
import sys
from contextlib import nullcontext, suppress

import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

logging.disable()
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
address = "http://{}:{}".format(*server.get_host_and_port())
files = s3fs.S3FileSystem(endpoint_url=address)
arrow_files = S3FileSystem(endpoint_override=address)
files.mkdir("bucket")
table = pa.table({"row": [0, 1, 2]})


class Failure(Exception):
    pass


def rows_after(open_file, transaction=None):
    """Rows of an object with 3 rows after its rewriting failed at the second."""
    with files.open("bucket/table.parquet", "wb") as file:
        pq.write_table(table, file)
    with suppress(Failure), transaction or nullcontext():
        with open_file() as file, pq.ParquetWriter(file, table.schema) as writer:
            writer.write_table(table.slice(0, 1))
            raise Failure
    files.invalidate_cache()
    with files.open("bucket/table.parquet", "rb") as file:
        return pq.read_table(file).num_rows


seen = {
    "s3fs": rows_after(lambda: files.open("bucket/table.parquet", "wb")),
    "pyarrow.fs": rows_after(lambda: arrow_files.open_output_stream("bucket/table.parquet")),
    "s3fs in a transaction": rows_after(lambda: files.open("bucket/table.parquet", "wb"), files.transaction),
}
server.stop()
told = {"s3fs": 1, "pyarrow.fs": 1, "s3fs in a transaction": 3}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF
