import gc
import os
import random
from collections.abc import Iterator

import pytest

from pipelines.errors import UserError
from pipelines.scratch import RowsById, scratch_database


@pytest.fixture
def rows() -> Iterator[RowsById]:
    with scratch_database() as database:
        yield RowsById(database)


def test_rows_are_found_by_their_id_in_the_order_they_came(rows: RowsById) -> None:
    assert rows.extend({"row_id": f"id{n % 3}", "n": n} for n in range(8)) == 8
    assert [row["n"] for row in rows.find("id1")] == [1, 4, 7]
    assert rows.find("id2") == [{"row_id": "id2", "n": 2}, {"row_id": "id2", "n": 5}]


def test_what_is_not_there_has_no_rows(rows: RowsById) -> None:
    assert rows.find("id") == []
    assert rows.extend([]) == 0
    assert rows.find("id") == []


def test_rows_added_after_a_search_are_found_too(rows: RowsById) -> None:
    rows.extend([{"row_id": "a", "n": 1}])
    assert len(rows.find("a")) == 1
    rows.extend([{"row_id": "a", "n": 2}, {"row_id": "b", "n": 3}])
    assert [row["n"] for row in rows.find("a")] == [1, 2]
    assert [row["n"] for row in rows.find("b")] == [3]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**62),
        0.1,
        "",
        "\x00",
        "a\x00b",
        "'; DROP TABLE said; --",
        "e\u0301",
        "🧾 \u202eשלום",
        "\ufffd\uffff",
        "x" * 3_000_000,
        ["a", None],
    ],
    ids=lambda value: repr(value)[:20],
)
def test_any_value_comes_back_as_it_was(rows: RowsById, value: object) -> None:
    rows.extend([{"row_id": "a", "value": value}])
    (found,) = rows.find("a")
    assert found["value"] == value
    assert type(found["value"]) is type(value)


def test_an_error_of_the_reader_comes_through(rows: RowsById) -> None:
    def broken() -> Iterator[dict[str, str]]:
        yield {"row_id": "a"}
        raise KeyError("row 2")

    with pytest.raises(KeyError, match="row 2"):
        rows.extend(broken())


def test_many_rows_in_any_order_are_all_found(rows: RowsById) -> None:
    ids = [f"{random.Random(n).getrandbits(96):024x}" for n in range(5000)]
    rows.extend({"row_id": i, "sample": sample} for sample in range(2) for i in sorted(ids))
    assert all([row["sample"] for row in rows.find(i)] == [0, 1] for i in ids)


def test_nothing_is_left_on_disk(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    with scratch_database() as database:
        RowsById(database).extend({"row_id": str(n), "text": "x" * 1000} for n in range(5000))
    gc.collect()
    assert os.listdir(str(tmp_path)) == []


def test_a_full_disk_is_said_in_a_sentence() -> None:
    def fill() -> None:
        with scratch_database() as database:
            database.execute("PRAGMA max_page_count=50")
            RowsById(database).extend({"row_id": str(n), "text": "x" * 1000} for n in range(5000))

    with pytest.raises(UserError, match="disk for temporary files is full; name a folder with room in SQLITE_TMPDIR"):
        fill()


def test_two_databases_know_nothing_of_each_other() -> None:
    with scratch_database() as one, scratch_database() as other:
        left, right = RowsById(one), RowsById(other)
        left.extend([{"row_id": "a"}])
        assert right.find("a") == []
