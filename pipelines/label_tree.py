"""The labels of a closed set as a tree of tokens: where they part, and which tokens may follow there.

A student that may write nothing but a label has a choice only where labels part. The probability of a label is the
product of those choices; nothing else of it need be computed, and none of the vocabulary's other tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LabelTree:
    """`prefixes` are the tokens before each parting, the first of them none; `nexts` the tokens that may follow each;
    `steps` the choices that make each label: of which prefix, and the token taken."""

    prefixes: tuple[tuple[int, ...], ...]
    nexts: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]


def label_tree(labels: Sequence[Sequence[int]]) -> LabelTree:
    """The tree of labels, each given as its tokens, the end of the sequence included."""
    follow: dict[tuple[int, ...], dict[int, None]] = {(): {}}
    for label in labels:
        for at, token in enumerate(label):
            follow.setdefault(tuple(label[:at]), {})[token] = None
    partings = {prefix: tuple(tokens) for prefix, tokens in follow.items() if not prefix or len(tokens) > 1}
    place = {prefix: number for number, prefix in enumerate(partings)}
    steps = (
        tuple((place[before], token) for at, token in enumerate(label) if (before := tuple(label[:at])) in place)
        for label in labels
    )
    return LabelTree(tuple(partings), tuple(partings.values()), tuple(steps))
