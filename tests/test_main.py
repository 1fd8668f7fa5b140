"""How the process of a command ends."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import sys
import time

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem

import pipelines.cli
from pipelines.__main__ import run


class Store(MemoryFileSystem):
    def _open(self, *arguments, **options):
        time.sleep(0.3)
        return super()._open(*arguments, **options)


def work():
    store = Store()
    for part in "abcd":
        with store.open(f"/{part}.parquet", "wb") as file:
            pq.write_table(pa.table({"a": range(1000)}), file)
    schema = pa.schema({"a": pa.int64()})
    rows = pyarrow.dataset.dataset([f"/{part}.parquet" for part in "abcd"], schema, "parquet", filesystem=store)
    print(len(next(rows.to_batches())))  # which leaves Arrow's threads at the other files
    END


pipelines.cli.main = work
run()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(2)", 2), ("sys.exit('no')", 1), ("raise KeyError", 1)]
)
def test_a_command_that_leaves_threads_at_a_store_keeps_its_exit_code(tmp_path: Path, end: str, code: int) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND.replace("END", end))
    made = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True, timeout=120)
    assert (made.returncode, made.stdout) == (code, "1000\n"), made.stderr
    assert ("Traceback" in made.stderr) is ("raise" in end)
