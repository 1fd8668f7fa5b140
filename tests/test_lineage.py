import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.lineage import Lineage, model_identity

MakeLine = Callable[..., Lineage]
STAGES = ("examples", "generations", "rationales", "dataset", "train", "evaluate", "report")


def keys(line: Lineage) -> dict[str, str]:
    """Stage -> key, of the first student where each student has its own."""
    run = line.recipe.students()[0]
    artifacts = [
        line.examples,
        line.generations,
        line.rationales,
        line.dataset,
        line.student(run),
        line.evaluation(run),
    ]
    return {artifact.stage: artifact.key for artifact in [*artifacts, line.report()]}


def changed(before: dict[str, str], line: Lineage) -> tuple[str, ...]:
    after = keys(line)
    return tuple(stage for stage in STAGES if before[stage] != after[stage])


def from_stage(stage: str) -> tuple[str, ...]:
    return STAGES[STAGES.index(stage) :]


def but_generations(stages: tuple[str, ...] = STAGES) -> tuple[str, ...]:
    """Stages that change while the texts that were paid for stay."""
    return tuple(stage for stage in stages if stage != "generations")


def test_every_stage_has_a_place_of_its_own(make_line: MakeLine) -> None:
    line = make_line()
    assert tuple(keys(line)) == STAGES
    assert len(set(keys(line).values())) == len(STAGES)
    assert line.dataset.uri == f"{line.recipe.storage}/small/dataset/{line.dataset.key}"


def test_the_same_recipe_leads_to_the_same_keys(make_line: MakeLine) -> None:
    assert changed(keys(make_line()), make_line()) == ()


@pytest.mark.parametrize(
    "override",
    [
        "teacher.replicas=[1, 4]",
        "teacher.gpus=2",
        "teacher.cpus=8",
        "teacher.batch_size=3",
        "teacher.kv_cache_gb=9",
        "student={model: MODEL, workers: 2}",
        "student={model: MODEL, gpus: 1}",
        "student={model: MODEL, cpus: 4, node_labels: {role: training}}",
        "teacher.node_labels={role: teacher}",
        "evaluate={batch_size: 3, replicas: 2, cpus: 2, gpus: 1}",
        "teacher.seed=5",
    ],
)
def test_resources_change_nothing(make_line: MakeLine, override: str) -> None:
    before = make_line()
    assert changed(keys(before), make_line(override.replace("MODEL", before.recipe.student.model))) == ()


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("teacher.temperature=0.7", "generations"),
        ("teacher.max_tokens=32", "generations"),
        ("teacher.engine_args.max_model_len=64", "generations"),
        ("teacher.prompt=chat", "generations"),
        ("teacher.chat_template_args={enable_thinking: false}", "generations"),
        ("teacher.constrain_answer=true", "generations"),
        ("teacher.splits=[train]", "rationales"),
        ("curate.thinking=rationale", "rationales"),
        ("curate.min_agreement=0.5", "rationales"),
        ("curate.on_disagree=rationalize", "rationales"),
        ("teacher.model=some/teacher", "generations"),
        ("curate.on_disagree=keep", "rationales"),
        ("curate.min_words=9", "rationales"),
        ("student.alpha=0.1", "train"),
        ("student.batch_size=8", "train"),
        ("student.steps=9", "train"),
        ("student.model=some/t5", "train"),
        ("evaluate.split=validation", "evaluate"),
        ("evaluate.resamples=100", "evaluate"),
        ("runs=[{arm: [standard]}]", "report"),
    ],
)
def test_a_setting_changes_its_own_stage_and_what_follows(make_line: MakeLine, override: str, first: str) -> None:
    assert changed(keys(make_line()), make_line(override)) == from_stage(first)


@pytest.mark.parametrize("override", ["source.limit=2", "source.unlabelled=", "source.near_duplicates=keep"])
def test_other_rows_ask_only_for_themselves(make_line: MakeLine, override: str) -> None:
    assert changed(keys(make_line()), make_line(override)) == but_generations()


def test_more_samples_are_added_to_those_that_are_there(make_line: MakeLine) -> None:
    drawn = "teacher.temperature=0.7"
    more = make_line(drawn, "teacher.samples=5")
    assert changed(keys(make_line(drawn)), more) == but_generations(from_stage("generations"))


@pytest.mark.parametrize("argument", ["max_num_seqs", "enforce_eager", "gpu_memory_utilization"])
def test_an_engines_resources_pay_for_nothing_again(make_line: MakeLine, argument: str) -> None:
    assert changed(keys(make_line()), make_line(f"teacher.engine_args.{argument}=1")) == ()


def test_an_endpoint_is_known_by_its_models_name_and_not_by_its_place(make_line: MakeLine) -> None:
    at = ["teacher.engine=openai", "teacher.model=m"]
    before = keys(make_line(*at, "teacher.endpoint.url=http://a/v1"))
    assert changed(before, make_line(*at, "teacher.endpoint={url: http://b/v1, concurrency: 2, retries: 0}")) == ()
    assert changed(before, make_line("teacher.engine=openai", "teacher.model=n", "teacher.endpoint.url=http://a/v1"))


def test_a_retry_that_is_whole_changes_what_is_read(make_line: MakeLine) -> None:
    line = make_line()
    before = keys(line)
    line.retry(2).finish({}, [], 0)
    assert changed(before, Lineage(line.recipe)) == (), "the first one is not there"
    line.retry(1).finish({}, [], 0)
    assert [artifact.key for artifact in Lineage(line.recipe).retries] == [line.retry(1).key, line.retry(2).key]
    assert changed(before, Lineage(line.recipe)) == from_stage("rationales")


def test_rationales_of_another_recipe_go_into_the_dataset(make_line: MakeLine) -> None:
    other = make_line("name=other").rationales
    before = keys(make_line())
    with pytest.raises(UserError, match=r"no manifest\.json in it"):
        _ = make_line(f"dataset.rationales=[{other.uri}]").dataset
    other.finish({}, [], 0)
    assert changed(before, make_line(f"dataset.rationales=[{other.uri}]")) == from_stage("dataset")
    examples = make_line("name=other").examples
    examples.finish({}, [], 0)
    wrong = make_line(f"dataset.rationales=[{examples.uri}]")
    with pytest.raises(UserError, match="give one of stage rationales"):
        _ = wrong.dataset


def test_a_split_that_the_source_lacks_is_not_asked_for(make_line: MakeLine) -> None:
    assert make_line().asked == ["train", "test", "unlabelled"]
    with pytest.raises(UserError, match="none of the splits unlabelled is in the source"):
        _ = make_line("teacher.splits=[unlabelled]", "source.unlabelled=").asked


def test_a_seed_counts_once_texts_are_drawn(make_line: MakeLine) -> None:
    drawn = "teacher.temperature=0.7"
    assert changed(keys(make_line(drawn)), make_line(drawn, "teacher.seed=5")) == from_stage("generations")


@pytest.mark.parametrize(
    "task",
    [
        {"instruction": "Say how it feels."},
        {"prompt": "Text: {input}\nMood:"},
        {"exemplars": []},
        {"exemplars": [{"input": {"text": "Rain."}, "rationale": "Rain is bad.", "label": "bad"}]},
        {"stop": ["END"]},
    ],
)
def test_another_prompt_asks_anew_and_reads_no_source_again(make_line: MakeLine, task: dict[str, Any]) -> None:
    assert changed(keys(make_line()), make_line(task=task)) == from_stage("generations")


@pytest.mark.parametrize(
    "task",
    [
        {"input": "Text: {text}"},
        {"name": "feeling"},
        {"answer": {"kind": "choice", "labels": ["good", "bad"], "sentence": "Answer: {label}"}},
    ],
)
def test_another_question_changes_everything(make_line: MakeLine, task: dict[str, Any]) -> None:
    assert changed(keys(make_line()), make_line(task=task)) == STAGES


@pytest.mark.parametrize(
    "task", [{"label": "mood"}, {"answer": {"kind": "choice", "labels": ["good", "bad", "mixed"]}}]
)
def test_what_the_teacher_does_not_see_is_not_paid_for_again(make_line: MakeLine, task: dict[str, Any]) -> None:
    assert changed(keys(make_line()), make_line(task=task)) == but_generations()


def test_a_hint_counts_where_it_is_given(make_line: MakeLine) -> None:
    hint = {"hint": "Gold: {label}"}
    assert changed(keys(make_line()), make_line(task=hint)) == ()
    told = "curate.on_disagree=rationalize"
    assert changed(keys(make_line(told)), make_line(told, task=hint)) == from_stage("rationales")


def test_a_description_changes_nothing(make_line: MakeLine) -> None:
    assert changed(keys(make_line()), make_line(task={"description": "How a text feels."})) == ()


def test_a_share_to_hold_out_counts_only_where_none_is_given(make_line: MakeLine) -> None:
    assert changed(keys(make_line()), make_line("source.validation_share=0.3")) == ()
    bare = "source.validation="
    assert changed(keys(make_line(bare)), make_line(bare, "source.validation_share=0.3")) == from_stage("dataset")


def test_other_rows_change_everything_and_another_place_nothing(make_line: MakeLine, tmp_path: Path) -> None:
    line = make_line()
    before = keys(line)
    shutil.copytree(tmp_path, tmp_path / "moved")
    assert keys(make_line(f"source.root={tmp_path / 'moved'}", f"storage={tmp_path / 'elsewhere'}")) == before
    train = tmp_path / "train.jsonl"
    train.write_text(train.read_text().replace("train 0", "train zero"))
    assert changed(before, Lineage(line.recipe)) == but_generations()


def test_a_model_is_known_by_its_content_and_not_by_its_place(make_line: MakeLine, tmp_path: Path) -> None:
    line = make_line()
    before = keys(line)
    moved = [
        f"{name}.model={shutil.copytree(tmp_path / name, tmp_path / 'far' / name)}" for name in ("teacher", "student")
    ]
    assert keys(make_line(*moved)) == before
    (tmp_path / "student" / "config.json").write_text("{}")
    assert changed(before, Lineage(line.recipe)) == from_stage("train")


def test_a_model_of_the_hub_is_known_by_name_and_revision() -> None:
    assert model_identity("some/model", None) == model_identity("some/model", "main")
    assert len({model_identity(*m) for m in [("some/model", None), ("some/other", None), ("some/model", "v1")]}) == 3


@pytest.mark.parametrize(
    "model", ["builtin:quickstart/absent", "./absent", "/absent", "~/absent/x", "a/b/c", "s3://b/m", "nowhere://x"]
)
def test_a_missing_model_is_named(model: str) -> None:
    with pytest.raises(UserError, match=re.escape(model)):
        model_identity(model, None)


def test_a_missing_source_is_named(make_line: MakeLine) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        _ = make_line("source.train=absent.jsonl").examples


# outputs that are given


def test_given_outputs_stand_for_the_teacher(make_line: MakeLine, tmp_path: Path) -> None:
    texts = {"train": [{"row_id": "r", "text": "So the answer is good."}]}
    line = make_line(texts=texts)
    before = keys(line)
    assert changed(before, make_line("teacher.max_tokens=3", "teacher.model=any/other", texts=texts)) == ()
    (tmp_path / "train-texts.jsonl").write_text(json.dumps({"row_id": "r", "text": "So the answer is bad."}))
    assert changed(before, Lineage(line.recipe)) == from_stage("generations")


def test_given_outputs_are_read_anew_where_another_text_ends_them(make_line: MakeLine) -> None:
    texts = {"train": [{"row_id": "r", "text": "So the answer is good."}]}
    before = keys(make_line(texts=texts))
    assert changed(before, make_line(texts=texts, task={"stop": ["END"]})) == from_stage("rationales")
    assert changed(before, make_line(texts=texts, task={"instruction": "Say how it feels."})) == ()


def test_parts_of_outputs_are_in_numeric_order(make_line: MakeLine, tmp_path: Path) -> None:
    for number in (10, 2, 1):
        (tmp_path / f"texts_{number}.json").write_text("[]")
    files = make_line().output_files("texts_*.json")
    assert [file.rpartition("/")[2] for file in files] == ["texts_1.json", "texts_2.json", "texts_10.json"]


def test_missing_outputs_are_named(make_line: MakeLine, tmp_path: Path) -> None:
    line = make_line("teacher.engine=outputs", "teacher.outputs={train: absent_*.json}")
    with pytest.raises(UserError, match=rf"teacher\.outputs: no file matches {tmp_path}/absent_\*\.json"):
        _ = line.generations


# parents


def test_a_stage_without_its_parent_says_which_command_makes_it(make_line: MakeLine) -> None:
    line = make_line()
    with pytest.raises(UserError) as error:
        line.require(line.dataset, "dataset")
    assert str(error.value) == (
        f"{line.dataset.uri}: not there yet; run `distill dataset` first, with the same recipe and settings"
    )


def test_a_parent_that_is_done_is_handed_on(make_line: MakeLine) -> None:
    line = make_line()
    line.dataset.finish({}, [], 0)
    assert line.require(line.dataset, "dataset") == line.dataset


def test_a_manifest_holds_the_resolved_recipe(make_line: MakeLine) -> None:
    line = make_line("student.steps=3")
    assert json.loads(json.dumps(line.snapshot()))["student"]["steps"] == 3
    assert line.snapshot()["evaluate"]["resamples"] == 2000
