import random
from typing import Any, Literal

import numpy as np
import pytest

from pipelines.duplicates import COMPARED, FOUND, Inputs, Repeat, band_hashes, bands_for, jaccard, runs_of_words
from pipelines.scratch import scratch_database

Near = Literal["keep", "drop_leaks", "drop"]
WORDS = [f"w{n}" for n in range(5000)]


def left_out(near: Near, similarity: float = 0.9, **splits: list[str]) -> dict[str, Repeat]:
    """Input → what it repeats, of rows whose ids are their inputs."""
    with scratch_database() as database:
        inputs = Inputs(database, near, similarity)
        for split, texts in splits.items():
            for text in texts:
                inputs.add({"row_id": text, "split": split, "input": text})
        return {row["input"]: repeat for row, repeat in inputs.rows() if repeat}


def text(seed: object, length: int = 60) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=length))


def changed(words: str, *places: int) -> str:
    """The text with other words at some places."""
    made = words.split()
    for place in places:
        made[place] = f"other{place % len(made)}"
    return " ".join(made)


# how alike two texts are


def test_runs_are_of_three_words_without_case_and_punctuation() -> None:
    assert runs_of_words("The cat -- SAT, “down”.") == {("the", "cat", "sat"), ("cat", "sat", "down")}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The cat sat down.", "the CAT sat -- down"),
        ("Straße der Ehre hier", "STRASSE DER EHRE HIER"),
        ("ﬁne weather we have", "fine weather we have"),
        ("schön ist es heute", "scho\u0308n ist es heute"),
    ],
)
def test_spelling_that_means_nothing_does_not_count(one: str, other: str) -> None:
    assert jaccard(runs_of_words(one), runs_of_words(other)) == 1


def test_a_text_under_three_words_is_compared_as_a_whole() -> None:
    assert jaccard(runs_of_words("Good day"), runs_of_words("good day!")) == 1
    assert jaccard(runs_of_words("Good day"), runs_of_words("good")) == 0
    assert jaccard(runs_of_words("good day"), runs_of_words("good day sir")) == 0


@pytest.mark.parametrize(
    ("one", "other", "alike"), [("🧾", "🧾", 1), ("🧾", "🙂", 0), ("?!", "?!", 1), ("?!", "!?", 0)]
)
def test_a_text_without_words_is_compared_as_a_whole(one: str, other: str, alike: int) -> None:
    assert jaccard(runs_of_words(one), runs_of_words(other)) == alike


def test_similarity_is_the_share_of_runs_in_common() -> None:
    assert jaccard(runs_of_words("a b c d e"), runs_of_words("a b c d f")) == 2 / 4


# finding them


@pytest.mark.parametrize("similarity", [0.501, 0.55, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_find_what_is_asked_for_with_the_probability_promised(similarity: float) -> None:
    bands, runs = bands_for(similarity)
    assert 1 - (1 - similarity**runs) ** bands >= FOUND
    assert bands * runs <= 48


@pytest.mark.parametrize("similarity", [0.6, 0.8, 0.9])
def test_pairs_at_the_similarity_asked_for_are_found_as_often_as_the_formula_says(similarity: float) -> None:
    length, places = {0.6: (26, (5, 15)), 0.8: (29, (12,)), 0.9: (59, (20,))}[similarity]
    ones = [text(n, length) for n in range(2000)]
    others = [changed(one, *places) for one in ones]
    alike = jaccard(runs_of_words(ones[0]), runs_of_words(others[0]))
    assert alike == pytest.approx(similarity)
    bands, runs = bands_for(similarity)
    shared = band_hashes(ones, bands, runs) == band_hashes(others, bands, runs)
    assert shared.mean() == pytest.approx(alike**runs, abs=0.03)
    assert shared.any(axis=0).mean() >= FOUND - 0.015  # of 2,000, three standard errors


def test_texts_that_have_nothing_in_common_share_no_band() -> None:
    hashes = band_hashes([text(n) for n in range(3000)], *bands_for(0.9))
    assert len(np.unique(hashes)) == hashes.size


def test_hashes_depend_on_the_text_alone() -> None:
    texts = ["one", "", "two words", text(1), "🧾 שלום \x00", "x " * 50_000, text(2, 3)]
    together = band_hashes(texts, 6, 8)
    alone = np.concatenate([band_hashes([t], 6, 8) for t in texts], axis=1)
    assert (together == alone).all()
    assert together[0, :2].tolist() == [14258555868391376903, 3357753058645748515]  # from release to release


# what is left out


def test_rows_that_nearly_stand_in_test_or_validation_are_leaks() -> None:
    tested, validated, mine = text("t"), text("v"), text("m")
    found = left_out(
        "drop_leaks",
        test=[tested],
        validation=[validated],
        train=[changed(tested, -1), mine, changed(mine, -1)],
        unlabelled=[changed(validated, 0)],
    )
    alike = 57 / 59
    assert found == {
        changed(tested, -1): Repeat(tested, alike, leak=True),
        changed(validated, 0): Repeat(validated, alike, leak=True),
    }


def test_drop_leaves_out_later_rows_of_train_and_unlabelled_too() -> None:
    tested, mine = text("t"), text("m")
    found = left_out(
        "drop", test=[tested], train=[mine, changed(mine, -1), changed(tested, -1)], unlabelled=[changed(mine, 0)]
    )
    assert {row: (repeat.of_row_id, repeat.leak) for row, repeat in found.items()} == {
        changed(mine, -1): (mine, False),
        changed(tested, -1): (tested, True),
        changed(mine, 0): (mine, False),
    }


def test_keep_compares_nothing() -> None:
    assert left_out("keep", test=[text(1)], train=[changed(text(1), 0)]) == {}


def test_validation_and_test_are_never_thinned() -> None:
    one = text(1)
    assert left_out("drop", test=[one, changed(one, 0)], validation=[changed(one, -1)]) == {}


def test_what_is_left_out_takes_nothing_with_it() -> None:
    first = text(1)
    second = changed(first, 0)
    third = changed(second, -1)  # nearly the second, but not the first
    assert (
        jaccard(runs_of_words(first), runs_of_words(third))
        < 0.95
        <= jaccard(runs_of_words(second), runs_of_words(third))
    )
    assert left_out("drop", 0.95, train=[first, second, third]).keys() == {second}


def test_a_pair_below_the_similarity_is_kept_though_it_was_looked_at() -> None:
    one = text(1)
    assert left_out("drop", 0.97, train=[one, changed(one, -1)]) == {}  # 57 of 59 runs: 0.966
    assert left_out("drop", 0.96, train=[one, changed(one, -1)]).keys() == {changed(one, -1)}


def test_at_similarity_one_only_spelling_may_differ() -> None:
    one = text(1)
    assert left_out("drop", 1.0, train=[one, one.upper() + " !", changed(one, -1)]).keys() == {one.upper() + " !"}


def test_an_input_word_for_word_the_same_is_not_added() -> None:
    with scratch_database() as database:
        inputs = Inputs(database, "drop", 0.9)
        row: dict[str, Any] = {"row_id": "a", "split": "test", "input": "text"}
        assert inputs.add(row) is None
        assert inputs.add(row | {"split": "train"}) == "test"
        assert [(r["split"], repeat) for r, repeat in inputs.rows()] == [("test", None)]


def test_rows_come_back_as_they_were_in_their_order() -> None:
    rows: list[dict[str, Any]] = [
        {"row_id": str(n), "split": "train", "position": n, "input": value, "choices": choices, "label": None}
        for n, (value, choices) in enumerate([("a\x00b", None), ("🧾 \u202eשלום", ["x", "y"]), ("z" * 200_000, [])])
    ]
    with scratch_database() as database:
        inputs = Inputs(database, "drop", 0.9)
        for row in rows:
            inputs.add(row)
        assert [row for row, _ in inputs.rows()] == rows


def test_no_rows_are_fine() -> None:
    assert left_out("drop") == {}


def test_rows_all_alike_are_compared_with_a_few_of_them() -> None:
    one = text(1, 200)
    rows = [changed(one, n) for n in range(190)]
    found = left_out("drop", train=rows)
    assert found.keys() == set(rows[1:])
    with scratch_database() as database:
        inputs = Inputs(database, "drop", 0.9)
        for row in rows:
            inputs.add({"row_id": row, "split": "train", "input": row})
        list(inputs.rows())
        (pairs,) = database.execute("SELECT count(*) FROM pairs").fetchone()
    assert pairs <= len(rows) * COMPARED * bands_for(0.9)[0]


def test_near_repeats_are_found_among_thousands_across_batches() -> None:
    texts = [text(n) for n in range(2500)]
    near = {changed(texts[n], -1): texts[n] for n in range(0, 2500, 25)}
    found = left_out("drop_leaks", test=texts, train=list(near))
    assert {row: repeat.of_row_id for row, repeat in found.items()}.items() <= near.items()
    assert len(found) >= 0.95 * len(near)
