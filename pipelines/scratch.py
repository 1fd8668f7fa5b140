"""Rows on disk, found by their row_id: how stages join and group any number of rows in constant memory.

By SQLite: its memory is its page cache and no more, and its cost a row hardly grows. (DuckDB's join and sort of a
million rows took three times the memory that they take for ten thousand.)
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.errors import UserError

Row = dict[str, Any]


@contextmanager
def scratch_database() -> Iterator[sqlite3.Connection]:
    """An empty database on disk that is gone afterwards. It lies in $SQLITE_TMPDIR, else $TMPDIR, else /var/tmp.

    Raises:
        UserError: that disk is full.
    """
    connection = sqlite3.connect("", isolation_level=None)  # without a name: a file of its own, which has none
    try:
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA temp_store=FILE")
        connection.execute("BEGIN")  # never committed: nothing here is to outlive a crash
        yield connection
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise UserError("the disk for temporary files is full; name a folder with room in SQLITE_TMPDIR") from error
    finally:
        connection.close()


class RowsById:
    """Rows on disk, found by their row_id. Values are what JSON can hold."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._sorted = False
        database.execute("CREATE TABLE said (row_id TEXT, row TEXT)")

    def extend(self, rows: Iterable[Row]) -> int:
        """Add rows, each with a `row_id`; returns how many they were."""
        pairs = ((row["row_id"], json.dumps(row)) for row in rows)
        return self._database.executemany("INSERT INTO said VALUES (?, ?)", pairs).rowcount

    def find(self, row_id: str) -> list[Row]:
        """The rows of an id, in the order in which they were added."""
        if not self._sorted:  # not before there are rows: to sort them once takes less than to keep them sorted
            self._database.execute("CREATE INDEX said_of ON said (row_id)")
            self._sorted = True
        found = self._database.execute("SELECT row FROM said WHERE row_id = ? ORDER BY rowid", (row_id,))
        return [json.loads(row) for (row,) in found]
