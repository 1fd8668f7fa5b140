"""Whether confidences mean what they say, and the temperature that makes them. Pure functions.

A row's probabilities are those of its possible answers; temperature T turns them into `p ** (1 / T)`, normalised.
"""

from collections.abc import Sequence

import numpy as np

_LEAST = 1e-12  # in place of a probability that has underflown
_HOTTEST, _COLDEST = 20.0, 0.05


def fit_temperature(probabilities: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """The temperature with the least negative log-likelihood of the right answers (Guo et al., ICML 2017, arXiv
    1706.04599), between 0.05 and 20.

    Args:
        probabilities: of each row's possible answers; one answer or more.
        right: the place of the right answer in each row.
    """
    width = max(map(len, probabilities))
    logs = np.full((len(right), width), -np.inf)
    for row, given in zip(logs, probabilities, strict=True):
        row[: len(given)] = np.log(np.maximum(given, _LEAST))
    logs -= logs.max(axis=1, keepdims=True)
    chosen = logs[np.arange(len(right)), right]

    def loss(inverse: float) -> float:
        return float((np.log(np.exp(inverse * logs).sum(axis=1)) - inverse * chosen).mean())

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    while high - low > 1e-4:  # the loss is convex in 1 / T
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return 2 / (low + high)


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """How far confidence and accuracy are apart on average, over bins with as many rows each (adaptive expected
    calibration error, Nixon et al. 2019, arXiv 1904.01685); from 0 to 1."""
    order = np.argsort(confidences, kind="stable")
    apart = 0.0
    for part in np.array_split(order, min(bins, len(order))):
        apart += abs(np.asarray(confidences)[part].mean() - np.asarray(right)[part].mean()) * len(part)
    return apart / len(order)


def choose_threshold(confidences: Sequence[float], right: Sequence[bool], accuracy: float) -> float | None:
    """The least confidence from which on so large a share of the answers is right; None where there is none."""
    order = np.argsort(-np.asarray(confidences), kind="stable")
    sure, hits = np.asarray(confidences)[order], np.cumsum(np.asarray(right)[order])
    enough = hits / np.arange(1, len(order) + 1) >= accuracy
    ends = np.append(sure[1:] < sure[:-1], True)  # equal confidences are answered or not together
    places = np.flatnonzero(enough & ends)
    return float(sure[places[-1]]) if len(places) else None
