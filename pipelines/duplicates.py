"""Inputs that repeat another, word for word or nearly, among any number of rows: in constant memory, at a constant
cost a row.

How alike two inputs are is the Jaccard similarity of their runs of three words. MinHash finds the pairs to look at:
of a permuted set of runs, the least is the same for two inputs with the probability of their similarity s; so a band
of r such least runs is the same with s^r, and at least one of b bands with 1 - (1 - s^r)^b. Bands are chosen so that
this is 0.95 or more from the similarity on that is asked for. A pair that is found so is then compared run by run, so
that nothing is taken for a repeat that is none.
"""

import itertools
import json
import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import numpy as np

Row = dict[str, Any]
Numbers = np.ndarray[Any, np.dtype[np.uint64]]
Runs = set[tuple[str, str, str]]

FOUND = 0.95
COMPARED = 16  # a row is compared with so many rows of a band, the first ones; most bands have one row
_PERMUTATIONS = 48  # more would find fewer pairs in vain, and take longer
_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 2**20
_random = np.random.default_rng(0)  # seeded, so that the same rows are left out every time
_FACTORS: Numbers = _random.integers(0, 2**63, _PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SUMMANDS: Numbers = _random.integers(0, 2**63, _PERMUTATIONS, dtype=np.uint64)


@dataclass(frozen=True)
class Repeat:
    """What a row nearly repeats."""

    of_row_id: str
    similarity: float
    leak: bool  # that row is one of validation or test


class Inputs:
    """The rows of all splits in the order in which they lay claim to their input: the first keeps it.

    Args:
        near: which rows are left out that nearly repeat another, see `recipe.Source`.
        similarity: from which on they do; in (0, 1].
    """

    def __init__(
        self, database: sqlite3.Connection, near: Literal["keep", "drop_leaks", "drop"], similarity: float
    ) -> None:
        self._database, self._near, self._similarity = database, near, similarity
        self._rows = 0
        self._measured = 0  # rows of test and validation, which have the lowest numbers
        self._waiting: list[tuple[int, str]] = []
        self._characters = 0
        for table in (
            "inputs (number INTEGER PRIMARY KEY, row_id TEXT UNIQUE, split TEXT, row TEXT)",
            "bands (band INTEGER, number INTEGER)",
            "pairs (later INTEGER, earlier INTEGER, PRIMARY KEY (later, earlier)) WITHOUT ROWID",
            "repeats (number INTEGER PRIMARY KEY, earlier INTEGER, similarity REAL)",
        ):
            database.execute(f"CREATE TABLE {table}")

    def add(self, row: Row) -> str | None:
        """Add a row of `schema.EXAMPLES`. Those of test and validation come before all others.

        Returns:
            The split where its row_id stands already, so that it is not added; else None.
        """
        values = (self._rows, row["row_id"], row["split"], json.dumps(row))
        if not self._database.execute("INSERT OR IGNORE INTO inputs VALUES (?, ?, ?, ?)", values).rowcount:
            found = self._database.execute("SELECT split FROM inputs WHERE row_id = ?", (row["row_id"],))
            return str(found.fetchone()[0])
        if self._near != "keep":
            self._waiting.append((self._rows, row["input"]))
            self._characters += len(row["input"])
            if len(self._waiting) == _BATCH_ROWS or self._characters > _BATCH_CHARACTERS:
                self._flush()
        self._rows += 1
        if row["split"] in ("test", "validation"):
            self._measured = self._rows
        return None

    def rows(self) -> Iterator[tuple[Row, Repeat | None]]:
        """The rows that were added, in their order, each with what it nearly repeats. They can be left out: a row
        that is so itself counts for nothing."""
        self._flush()
        self._compare()
        found = self._database.execute(
            "SELECT inputs.row, other.row_id, similarity, other.number FROM inputs LEFT JOIN repeats USING (number)"
            " LEFT JOIN inputs AS other ON other.number = earlier ORDER BY inputs.number"
        )
        for row, of_row_id, similarity, of_number in found:
            repeat = None if of_row_id is None else Repeat(of_row_id, similarity, leak=of_number < self._measured)
            yield json.loads(row), repeat

    def _flush(self) -> None:
        if self._waiting:
            numbers, texts = zip(*self._waiting, strict=True)
            for band in band_hashes(texts, *bands_for(self._similarity)):
                pairs = zip(band.view(np.int64).tolist(), numbers, strict=True)
                self._database.executemany("INSERT INTO bands VALUES (?, ?)", pairs)
            self._waiting, self._characters = [], 0

    def _compare(self) -> None:
        self._database.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?)", self._pairs())
        pairs = self._database.execute("SELECT later, earlier FROM pairs ORDER BY later, earlier")
        for later, group in itertools.groupby(pairs, key=itemgetter(0)):
            runs = self._runs(later)
            for _, earlier in group:
                left_out = self._database.execute("SELECT 1 FROM repeats WHERE number = ?", (earlier,)).fetchone()
                if not left_out and (alike := jaccard(runs, self._runs(earlier))) >= self._similarity:
                    self._database.execute("INSERT INTO repeats VALUES (?, ?, ?)", (later, earlier, alike))
                    break

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """(later row, earlier row) that share a band."""
        bands = self._database.execute("SELECT band, number FROM bands ORDER BY band, number")
        for _, group in itertools.groupby(bands, key=itemgetter(0)):
            first: list[int] = []
            for _, number in group:
                if number >= self._measured:
                    yield from ((number, earlier) for earlier in first)
                if len(first) < COMPARED and (number < self._measured or self._near == "drop"):
                    first.append(number)

    def _runs(self, number: int) -> Runs:
        (row,) = self._database.execute("SELECT row FROM inputs WHERE number = ?", (number,)).fetchone()
        return runs_of_words(json.loads(row)["input"])


def jaccard(left: Runs, right: Runs) -> float:
    """The share of all runs that both have."""
    return len(left & right) / len(left | right)


def runs_of_words(text: str) -> Runs:
    """Every three words that follow each other, without case and punctuation; a shorter text is one run."""
    words = _words(text)
    return set(zip(words, words[1:], words[2:], strict=False))


def bands_for(similarity: float) -> tuple[int, int]:
    """How many bands, of how many least runs each, find a pair of that similarity with the probability FOUND.

    Returns:
        (bands, runs), with as many runs as the permutations allow: they find the fewest pairs in vain.
    """
    for runs in range(_PERMUTATIONS, 0, -1):
        for bands in range(1, _PERMUTATIONS // runs + 1):
            if 1 - (1 - similarity**runs) ** bands >= FOUND:
                return bands, runs
    raise ValueError(f"a similarity of {similarity} is too low to be looked for")


def band_hashes(texts: Sequence[str], bands: int, runs: int) -> Numbers:
    """A hash of every band of every text.

    Returns:
        Array [bands, texts]; of two texts, equal numbers in a line mean (as good as surely) an equal band.
    """
    words = [_words(text) for text in texts]
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = lengths.cumsum()
    hashes = np.fromiter((zlib.crc32(word.encode()) for text in words for word in text), np.uint64, ends[-1])
    threes = _mixed(_mixed(_mixed(hashes[:-2]) + hashes[1:-1]) + hashes[2:])
    within = np.ones(len(hashes), dtype=bool)
    within[ends - 1] = within[ends - 2] = False  # there a run would go on into the next text
    threes = threes[within[:-2]]
    starts = ends - lengths - 2 * np.arange(len(texts))
    made = np.empty((bands, len(texts)), np.uint64)
    for band in range(bands):
        made[band] = band
        for permutation in range(band * runs, (band + 1) * runs):
            permuted = threes * _FACTORS[permutation] + _SUMMANDS[permutation]
            made[band] = _mixed(made[band] + np.minimum.reduceat(permuted, starts))
    return made


def _words(text: str) -> list[str]:
    """At least three, of which the last may be empty."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+", text) or [text]
    return words + [""] * (3 - len(words))


def _mixed(numbers: Numbers) -> Numbers:
    """Every bit of a number made to depend on all of it (the finaliser of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
