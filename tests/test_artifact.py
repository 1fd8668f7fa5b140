import shutil
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import artifact as module
from pipelines.artifact import PART_ROWS, Artifact, fingerprint, make_key, open_store
from pipelines.errors import UserError

SCHEMA = pa.schema([("name", pa.string()), ("size", pa.int64())])


@pytest.fixture(params=["local", "memory", "odd"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    """One on a disk, one in fsspec's memory, and one whose path holds characters that globs and URIs care for."""
    storage = {"local": str(tmp_path), "memory": f"memory://{uuid.uuid4().hex}", "odd": f"{tmp_path}/runs [1] *?#%20é"}
    return open_store(storage[request.param], "mine").artifact("examples", "0123456789ab")


def finish(artifact: Artifact, *parents: Artifact) -> None:
    artifact.finish({"name": "mine"}, list(parents), time.time() - 2, counts={"train": 3})


def names(artifact: Artifact, folder: str) -> list[str | None]:
    return [row["name"] for row in artifact.iter_rows(folder)]


def test_an_artifact_lies_under_storage_recipe_stage_and_key(artifact: Artifact) -> None:
    assert artifact.uri.endswith("/mine/examples/0123456789ab")
    assert artifact.file_uri("x.parquet") == f"{artifact.uri}/x.parquet"


def test_a_relative_storage_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("runs", "mine").root == str(tmp_path / "runs" / "mine")


def test_a_storage_of_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match="nowhere://bucket: can't be opened"):
        open_store("nowhere://bucket", "mine")


def test_it_is_done_only_once_its_manifest_is_written(artifact: Artifact) -> None:
    assert artifact.begin(force=False)
    artifact.write_table("rows", pa.table({"name": ["a"]}))
    assert not artifact.done()
    finish(artifact)
    assert artifact.done()
    assert artifact.fs.find(artifact.path()) == [artifact.path("manifest.json"), artifact.path("rows.parquet")]


def test_the_manifest_tells_what_it_was_made_of(artifact: Artifact) -> None:
    parent = Artifact(artifact.uri + "-parent", "source", "ffff")
    finish(artifact, parent)
    manifest = artifact.manifest()
    assert manifest["stage"] == "examples"
    assert manifest["key"] == "0123456789ab"
    assert manifest["parents"] == {"source": "ffff"}
    assert manifest["recipe"] == {"name": "mine"}
    assert manifest["counts"] == {"train": 3}
    assert manifest["seconds"] >= 2
    assert "torch" in manifest["versions"]


def test_a_finished_one_is_skipped_and_says_so(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    artifact.begin(force=False)
    artifact.write_table("rows", pa.table({"name": ["a"]}))
    finish(artifact)
    capsys.readouterr()
    assert not artifact.begin(force=False)
    assert capsys.readouterr().out == "examples 0123456789ab: done before, skipped\n"
    assert names(artifact, "") == ["a"]


def test_force_does_a_finished_one_again_from_nothing(artifact: Artifact) -> None:
    artifact.write_table("rows", pa.table({"name": ["a"]}))
    finish(artifact)
    assert artifact.begin(force=True)
    assert not artifact.done()
    assert artifact.fs.find(artifact.path()) == []


def test_what_an_unfinished_attempt_left_is_removed(artifact: Artifact) -> None:
    artifact.begin(force=False)
    artifact.write_table("rows/00007", pa.table({"name": ["stale"]}))
    assert artifact.begin(force=False)
    assert names(artifact, "rows") == []


def test_a_table_is_read_back_with_the_columns_asked_for(artifact: Artifact) -> None:
    table = pa.table({"name": ["a", None], "size": [1, 2]})
    artifact.write_table("rows", table)
    assert artifact.read_table("rows").equals(table)
    assert artifact.read_table("rows", columns=["size"]).equals(table.select(["size"]))


def test_rows_become_parts_in_their_order(artifact: Artifact) -> None:
    count = 2 * PART_ROWS + 1
    with artifact.writer("rows", SCHEMA) as writer:
        for number in range(count):
            writer.add({"name": str(number), "size": number, "beyond the schema": "left out"})
    parts = artifact.fs.find(artifact.path("rows"))
    assert [part.rpartition("/")[2] for part in parts] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert names(artifact, "rows") == [str(number) for number in range(count)]
    assert artifact.read_table("rows").num_rows == count


def test_as_many_rows_as_a_part_holds_make_one_part(artifact: Artifact) -> None:
    with artifact.writer("rows", SCHEMA) as writer:
        for number in range(PART_ROWS):
            writer.add({"size": number})
    assert len(artifact.fs.find(artifact.path("rows"))) == 1


def test_parts_grow_with_their_number(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PART_ROWS", 2), ("_EQUAL_PARTS", 2), ("_DOUBLINGS", 2)):
        monkeypatch.setattr(module, name, value)
    with artifact.writer("rows", SCHEMA) as writer:
        for number in range(39):
            writer.add({"name": str(number)})
    rows = [artifact.read_table(f"rows/{number:05d}").num_rows for number in range(len(artifact.parts("rows")))]
    assert rows == [2, 2, 4, 4, 8, 8, 8, 3]
    assert names(artifact, "rows") == [str(number) for number in range(39)]


def test_no_rows_still_have_their_columns(artifact: Artifact) -> None:
    with artifact.writer("rows", SCHEMA):
        pass
    assert artifact.read_table("rows").schema.equals(SCHEMA)
    assert names(artifact, "rows") == []


def test_an_exception_while_writing_leaves_no_half_part(artifact: Artifact) -> None:
    def write_and_fail() -> None:
        with artifact.writer("rows", SCHEMA) as writer:
            writer.add({"name": "a"})
            raise KeyError

    artifact.begin(force=False)
    with pytest.raises(KeyError):
        write_and_fail()
    assert not artifact.fs.exists(artifact.path("rows"))
    assert not artifact.done()


def test_parts_are_scanned_without_being_read_whole(artifact: Artifact) -> None:
    with artifact.writer("rows", SCHEMA) as writer:
        for number in range(PART_ROWS + 1):
            writer.add({"name": str(number), "size": number})
    dataset = artifact.dataset("rows", SCHEMA)
    assert len(dataset.files) == 2
    assert dataset.count_rows() == PART_ROWS + 1
    assert dataset.to_table(columns=["size"])["size"].to_pylist() == list(range(PART_ROWS + 1))


def test_any_number_of_parts_is_scanned_some_at_a_time(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCANNED", 2)
    for number in range(5):
        artifact.write_part(f"rows/{number}", pa.table({"name": [f"{number}"], "size": [number]}, SCHEMA))
    found = [size for batch in artifact.scan("rows", SCHEMA, ["size"]) for size in batch["size"].to_pylist()]
    assert sorted(found) == list(range(5))
    assert list(artifact.scan("absent", SCHEMA, ["size"])) == []


def test_a_folder_that_is_not_there_has_no_parts(artifact: Artifact) -> None:
    assert artifact.dataset("rows", pa.schema([])).files == []
    assert names(artifact, "rows") == []


def test_files_not_yet_finished_are_not_read(artifact: Artifact) -> None:
    artifact.write_table("rows/00000", pa.table({"name": ["a"]}))
    artifact.write_table("rows/.00001", pa.table({"name": ["b"]}))
    assert names(artifact, "rows") == ["a"]
    assert artifact.dataset("rows", pa.schema([("name", pa.string())])).count_rows() == 1


def test_a_storage_within_a_hidden_folder_is_read_as_any_other(tmp_path: Path) -> None:
    artifact = open_store(str(tmp_path / ".cache"), "mine").artifact("examples", "0123456789ab")
    artifact.write_table("rows/00000", pa.table({"name": ["a"]}))
    assert names(artifact, "rows") == ["a"]
    assert artifact.dataset("rows", pa.schema([("name", pa.string())])).count_rows() == 1


def test_any_text_comes_back_as_it_was(artifact: Artifact) -> None:
    texts = ["", "\x00", "e\u0301", "🧾 \u202eשלום", "x" * 100_000, None]
    with artifact.writer("rows", SCHEMA) as writer:
        for text in texts:
            writer.add({"name": text})
    assert names(artifact, "rows") == texts


# keys


def test_a_key_is_the_same_whatever_the_order_of_names() -> None:
    assert make_key("train", {"a": 1, "b": {"c": 2, "d": 3}}) == make_key("train", {"b": {"d": 3, "c": 2}, "a": 1})


def test_a_key_stays_the_same_from_release_to_release() -> None:
    assert make_key("examples", {"fraction": 0.5, "text": "é"}, None) == "a39364a30188"


@pytest.mark.parametrize(
    "other", [("train", [2, 1]), ("train", ["1", 2]), ("train", [1, 2], None), ("dataset", [1, 2])]
)
def test_other_content_has_another_key(other: tuple[object, ...]) -> None:
    assert make_key(*other) != make_key("train", [1, 2])


# fingerprints


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "parts").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "parts" / "weights").write_bytes(b"\x00\x01")
    return folder


def test_a_fingerprint_does_not_look_at_time_or_place(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model))
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    (moved / "config.json").touch()
    assert fingerprint(str(moved)) == fingerprint(f"{moved}/") == before


def test_a_fingerprint_changes_with_content_and_names(model: Path) -> None:
    seen = {fingerprint(str(model))}
    (model / "parts" / "weights").write_bytes(b"\x00\x02")
    seen.add(fingerprint(str(model)))
    (model / "parts" / "weights").rename(model / "parts" / "other")
    seen.add(fingerprint(str(model)))
    (model / "further").touch()
    seen.add(fingerprint(str(model)))
    assert len(seen) == 4


def test_a_fingerprint_follows_links_as_the_hub_cache_makes_them(model: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    shutil.copy(model / "config.json", blob)
    before = fingerprint(str(model))
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(blob)
    assert fingerprint(str(model)) == before
    blob.write_text("[]")
    assert fingerprint(str(model)) != before


def test_a_fingerprint_leaves_out_hidden_files(model: Path) -> None:
    before = fingerprint(str(model))
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").touch()
    (model / ".DS_Store").touch()
    assert fingerprint(str(model)) == before


def test_a_fingerprint_of_a_file_is_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / ".b").write_text("one")
    (tmp_path / "c").write_text("two")
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / ".b")) != fingerprint(str(tmp_path / "c"))


def test_a_fingerprint_of_a_large_file_tells_its_ends_apart(tmp_path: Path) -> None:
    path = tmp_path / "large"
    seen = set()
    for place in (0, 40 * 2**20, 65 * 2**20):
        with path.open("wb") as file:
            file.truncate(65 * 2**20 + 1)  # sparse: takes no room
            file.seek(place)
            file.write(b"\x01")
        seen.add(fingerprint(str(path)))
    assert len(seen) == 3


@pytest.mark.parametrize("path", ["absent.jsonl", "/absent/model", "nowhere://bucket/x"])
def test_a_fingerprint_of_nothing_names_what_is_missing(path: str) -> None:
    with pytest.raises(UserError, match=path):
        fingerprint(path)
