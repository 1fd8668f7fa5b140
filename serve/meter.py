"""What Prometheus gets to see, beside Ray Serve's own series. Each is prefixed `ray_` where it is scraped."""

import collections
from collections.abc import Sequence

from ray.serve.metrics import Counter, Histogram

from pipelines.predictor import Prediction

_MILLISECONDS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
_TOKENS = [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
_OF_MODEL = ("model", "version")


class Meter:
    """The series of one replica."""

    def __init__(self) -> None:
        self._requests = Counter("distill_requests", "Requests answered.", ("path", "status"))
        self._rejected = Counter("distill_rejected", "Requests refused by the application.", ("reason",))
        self._rows = Histogram("distill_batch_rows", "Inputs of one batch.", _ROWS, _OF_MODEL)
        self._tokens = Histogram("distill_batch_tokens", "Tokens of one batch.", _TOKENS, _OF_MODEL)
        self._queue = Histogram("distill_queue_ms", "From a request's parsing to its batch.", _MILLISECONDS, _OF_MODEL)
        self._model = Histogram("distill_model_ms", "Of one batch in the model.", _MILLISECONDS, _OF_MODEL)
        self._labels = Counter("distill_labels", "Answers by label, of closed sets.", (*_OF_MODEL, "label"))
        self._abstained = Counter("distill_abstained", "Answers below the threshold.", _OF_MODEL)
        self._escalated = Counter("distill_escalated", "Inputs for the teacher, by what came of them.", ("outcome",))
        self._shadowed = Counter(
            "distill_shadowed", "Answers of a shadow beside the served ones.", (*_OF_MODEL, "same")
        )

    def escalated(self, outcome: str) -> None:
        self._escalated.inc(tags={"outcome": outcome})

    def request(self, path: str, status: int) -> None:
        self._requests.inc(tags={"path": path, "status": str(status)})

    def rejected(self, reason: str) -> None:
        self._rejected.inc(tags={"reason": reason})

    def batch(self, model: str, version: str, rows: int, tokens: int, milliseconds: float) -> None:
        tags = {"model": model, "version": version}
        self._rows.observe(rows, tags=tags)
        self._tokens.observe(tokens, tags=tags)
        self._model.observe(milliseconds, tags=tags)

    def queued(self, model: str, version: str, milliseconds: float) -> None:
        self._queue.observe(milliseconds, tags={"model": model, "version": version})

    def answers(self, model: str, version: str, made: Sequence[Prediction], closed: bool) -> None:
        """Count answers; labels only of a closed set, so that no series is made for each text."""
        tags = {"model": model, "version": version}
        if abstained := sum(prediction.abstained for prediction in made):
            self._abstained.inc(abstained, tags=tags)
        labels = collections.Counter(prediction.label for prediction in made if prediction.label is not None)
        for label, count in labels.items() if closed else ():
            self._labels.inc(count, tags={**tags, "label": label})

    def shadowed(self, model: str, version: str, same: bool) -> None:
        self._shadowed.inc(tags={"model": model, "version": version, "same": str(same).lower()})
