"""Students to serve, made on the spot from the quickstart's student base."""

from collections.abc import Sequence

import pytest

from pipelines.predictor import Bundle, Prediction, Predictor
from pipelines.recipe import resolve
from pipelines.student import load_student
from pipelines.tasks import load_task
from serve.api import Student


class Direct:
    """A predictor that answers at once."""

    def __init__(self, name: str, task: str) -> None:
        model, tokenizer = load_student(resolve("builtin:quickstart/student"))
        self.name, self.version, self.task = name, "1", load_task(task)
        bundle = Bundle(name, "1", temperature=2.0, abstain_below=0.4)
        self.predictor = Predictor(model, tokenizer, self.task, max_new_tokens=8, bundle=bundle)

    async def answer(
        self, texts: Sequence[str], choices: Sequence[Sequence[str] | None], scores: bool
    ) -> list[Prediction]:
        return self.predictor.predict(texts, choices, scores=scores)


class Both:
    """A choice and a row_choice student."""

    def __init__(self) -> None:
        self.by_name = {"returns": Direct("returns", "returns_desk"), "quiz": Direct("quiz", "cqa")}

    def pick(self, model: str | None) -> Student:
        return self.by_name[(model or "returns").removesuffix("@1")]

    async def escalate(self, *_: object) -> dict[int, str]:
        return {}

    def shadow(self, *_: object) -> None:
        pass

    def listed(self) -> list[tuple[Student, float]]:
        return [(student, 1.0) for student in self.by_name.values()]


@pytest.fixture(scope="session")
def students() -> Both:
    return Both()
