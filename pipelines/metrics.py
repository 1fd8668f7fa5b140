"""How good predictions are, beyond accuracy: pure functions of gold labels, predictions and confidences.

Shares are in [0, 1]. A prediction of None is an output that is no answer of the task: wrong, and counted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

INVALID = "(invalid)"
_BINS = 10
_COVERAGES = [step / 20 for step in range(20, 0, -1)]


def classify(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> dict[str, Any]:
    """Macro-F1 over the labels of a closed set, and the confusion matrix.

    Returns:
        `macro_f1`; `confusion` with `labels` and `matrix`, whose rows are gold and whose columns predicted; where an
        output was no answer, the last column is `INVALID`.
    """
    from sklearn.metrics import confusion_matrix, f1_score  # a second, and only evaluation needs it

    said = [INVALID if label is None else label for label in predicted]
    columns = [*labels, INVALID] if INVALID in said else list(labels)
    matrix = confusion_matrix(gold, said, labels=columns)[: len(labels)]
    return {
        "macro_f1": float(f1_score(gold, said, labels=list(labels), average="macro", zero_division=0.0)),
        "confusion": {"labels": columns, "matrix": matrix.tolist()},
    }


def calibrate(correct: npt.ArrayLike, confidence: npt.ArrayLike) -> dict[str, Any]:
    """The expected calibration error in ten bins of equal width (Naeini et al., AAAI 2015), and the bins.

    Returns:
        `ece`; `bins` that hold a row, with their mean `confidence`, their `accuracy` and `rows`.
    """
    right, sure = np.asarray(correct, float), np.asarray(confidence, float)
    places = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    bins = [
        {"confidence": float(sure[here].mean()), "accuracy": float(right[here].mean()), "rows": int(here.sum())}
        for here in (places == place for place in range(_BINS))
        if here.any()
    ]
    return {"ece": sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(right), "bins": bins}


def cover(correct: npt.ArrayLike, confidence: npt.ArrayLike) -> list[dict[str, float]]:
    """Accuracy among the surest rows, when a student abstains from the others.

    Returns:
        From all rows down to a twentieth: `coverage`, the share answered; `threshold`, the confidence that the least
        sure of them has; `accuracy`.
    """
    right, sure = np.asarray(correct, float), np.asarray(confidence, float)
    order = np.argsort(-sure, kind="stable")
    among = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    counts = sorted({max(1, round(share * len(order))) for share in _COVERAGES}, reverse=True)
    return [
        {
            "coverage": count / len(order),
            "threshold": float(sure[order[count - 1]]),
            "accuracy": float(among[count - 1]),
        }
        for count in counts
    ]
