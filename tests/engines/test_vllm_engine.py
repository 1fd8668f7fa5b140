"""vLLM in process, on the quickstart's teacher."""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from pipelines.engines import Completion, EngineDied, Request
from pipelines.engines.vllm_engine import VllmEngine, engine_arguments
from pipelines.errors import UserError
from pipelines.prompts import answer_structure, chat_messages, completion_prompt, stop_strings
from pipelines.recipe import Teacher, load_recipe
from pipelines.replies import read_reply
from pipelines.tasks import load_task

pytestmark = pytest.mark.ray

TASK = load_task("returns_desk")
MESSAGES = [
    f"The {item} stopped working. I bought it {weeks} weeks ago. I {kept} the receipt."
    for item in ("lamp", "fan", "watch")
    for weeks in (2, 5, 20, 40)
    for kept in ("kept", "lost")
]
# a template in the form that the quickstart's teacher was trained on
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Message: {{ m['content'] }}\nReasoning:"
    "{% else %}{% if m['role'] == 'assistant' %} {% endif %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """The quickstart's teacher with a chat template."""
    folder: Path = tmp_path_factory.mktemp("model")
    made = load_recipe("quickstart").teacher
    source = Path(engine_arguments(made)["model"])
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return made.model_copy(update={"model": str(folder)})


@pytest.fixture(scope="module")
def engine(teacher: Teacher) -> Iterator[VllmEngine]:
    with closing(VllmEngine(teacher, stop_strings(TASK))) as made:
        yield made


def asked(texts: Sequence[str]) -> list[Request]:
    return [Request(completion_prompt(TASK, text)) for text in texts]


def labels(made: Sequence[Completion]) -> list[str | None]:
    return [read_reply(TASK, one.text).label for one in made]


def test_threads_share_one_engine_and_each_has_its_own_rows(engine: VllmEngine) -> None:
    together = engine.generate(asked(MESSAGES))
    with ThreadPoolExecutor(6) as pool:
        apart = list(pool.map(engine.generate, [asked([text]) for text in MESSAGES]))
    assert [one.text for [one] in apart] == [one.text for one in together]
    assert {one.finish_reason for one in together} == {"stop"}
    assert None not in labels(together)
    assert all(one.input_tokens and one.output_tokens for one in together)
    assert all((one.cached_tokens or 0) > 300 for [one] in apart), "exemplars stand first and are computed once"


def test_rows_that_cannot_be_asked_spoil_no_other(engine: VllmEngine) -> None:
    texts = ["I lost the receipt. " * 2000, MESSAGES[0], "Übergrößenträger \x00\x1b 🧾 \u202e", " "]
    long, good, odd, empty = engine.generate(asked(texts))
    assert (long.finish_reason, long.text) == ("too_long", "")
    assert "the model's context holds 1,024" in str(long.error)
    assert good.finish_reason == "stop"
    assert {odd.finish_reason, empty.finish_reason} <= {"stop", "length"}


def test_a_seed_of_its_own_makes_a_text_independent_of_its_batch(engine: VllmEngine) -> None:
    warm = engine.teacher.model_copy(update={"temperature": 1.0})
    before, engine.teacher = engine.teacher, warm
    try:
        alone = engine.generate([Request(asked(MESSAGES)[0].prompt, seed=7)])[0]
        crowd = engine.generate([Request(request.prompt, seed=7 + n) for n, request in enumerate(asked(MESSAGES))])
    finally:
        engine.teacher = before
    assert crowd[0].text == alone.text
    assert len({one.text for one in crowd}) > len(MESSAGES) // 2


def test_an_answer_can_be_held_to_the_set(engine: VllmEngine) -> None:
    nonsense = ["What time is it?", "Zzz.", MESSAGES[0]]
    form = answer_structure(TASK)
    made = engine.generate([Request(request.prompt, structure=form) for request in asked(nonsense)])
    assert all(one.finish_reason == "length" or label for one, label in zip(made, labels(made), strict=True))
    assert made[-1].finish_reason == "stop"


def test_a_chat_goes_through_the_models_own_template(engine: VllmEngine) -> None:
    chats = [Request(chat_messages(TASK, text)) for text in MESSAGES[:6]]
    told = [read_reply(TASK, one.text, style="chat").label for one in engine.generate(chats)]
    assert told == labels(engine.generate(asked(MESSAGES[:6])))


def test_a_model_that_does_not_start_is_told_in_a_sentence(teacher: Teacher) -> None:
    broken = teacher.model_copy(update={"engine_args": {"max_model_len": 10**9}})
    with (
        closing(VllmEngine(broken, [])) as made,
        pytest.raises(UserError, match=r"vLLM does not start: .*max_model_len"),
    ):
        made.generate(asked(MESSAGES[:1]))


def test_an_engine_that_fails_says_so_to_all_who_wait(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the device is lost")

    assert engine.generate(asked(MESSAGES[:1]))
    monkeypatch.setattr(engine._engine, "step", fail)
    for _ in range(2):
        with pytest.raises(EngineDied, match="the device is lost"):
            engine.generate(asked(MESSAGES))
