"""Whole projects, from files as users have them to a task and a recipe that the other stages accept.

Some tests read sets of the paper, which are not part of this project: the environment variable STEPDISTILL_REFERENCE
names the folder that holds them.
"""

import csv
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.dataset import build_dataset
from pipelines.draw import position_in_unit
from pipelines.errors import UserError
from pipelines.examples import read_examples
from pipelines.init import Project, init_project
from pipelines.init.project import ALIKE, EXEMPLAR_CHARACTERS, VALIDATION_SHARE
from pipelines.lineage import Lineage
from pipelines.prompts import completion, completion_prompt
from pipelines.rationales import build_rationales
from pipelines.recipe import PACKAGE, load_recipe
from pipelines.replies import read_reply
from pipelines.tasks import Task, load_task
from pipelines.tasks.task import normalise_answer

pytestmark = pytest.mark.slow

Row = dict[str, Any]
REFERENCE = Path(os.environ.get("STEPDISTILL_REFERENCE", Path(__file__).parents[3] / "shared/data/reference"))
WORDS = "order invoice login slow card refund cable office printer code email form urgent price plan data late".split()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sentence(draw: random.Random, words: int = 12) -> str:
    return " ".join(draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(words))


def write_rows(name: str, rows: list[Row]) -> str:
    """A file of rows in the current folder, of the kind that its name says."""
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), name)
        return name
    with open(name, "w", encoding="utf-8", newline="") as file:
        if name.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if name.endswith(".csv") else "\t")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return name


def rows_of(labels: list[Any], count: int = 200) -> list[Row]:
    draw = random.Random(1)
    return [{"text": sentence(draw), "label": labels[n % len(labels)]} for n in range(count)]


def accepted(project: Project) -> tuple[Task, list[Row]]:
    """The task and the examples of a project's file, which is read as a run reads it."""
    line = Lineage(load_recipe(project.recipe))
    assert line.report().key  # every file and setting that any stage asks for is there
    files = line.recipe.source.files()
    return line.task, [row for split, path in files.items() for row in read_examples(line.task, path, split)]


# files as users have them


def test_support_tickets_with_twelve_queues_and_three_rare_ones(capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(2)
    rare = ["legal", "legal", "press"]
    rows = [
        {
            "ticket_id": 1000 + n,
            "created_at": f"2024-03-{10 + n % 20} 10:00",
            "subject": sentence(draw, 4),
            "body": sentence(draw, draw.randrange(5, 60)) + "\n\nRegards, {name}",
            "priority": f"P{n % 3}",
            "queue": rare[n] if n < 3 else f"queue {n % 12}",
        }
        for n in range(600)
    ]
    project = init_project(write_rows("tickets.csv", rows))
    task, examples = accepted(project)
    assert project.inputs == ("subject", "body")
    assert (project.kind, project.label) == ("choice", "queue")
    assert task.input == "Subject: {subject}\nBody: {body}"
    assert len(task.answer.labels) == 14
    assert len(examples) == 600
    assert len({e.label for e in task.exemplars}) == len(task.exemplars) == 8
    assert any("legal (2), press (1)" in note for note in project.notes)
    said = capsys.readouterr().out
    assert "distill run tickets-recipe.yaml" in said
    assert "left out: a date" in said
    written = Path(project.task).read_text()
    assert "#   created_at: a date" in written
    assert "# None shows" in written
    assert "legal" in written.split("# None shows")[1].splitlines()[0]


def test_reviews_with_stars() -> None:
    draw = random.Random(3)
    rows = [
        {"ReviewId": f"R{n}", "product": f"B{n % 3}", "text": sentence(draw, 30), "stars": draw.randint(1, 5)}
        for n in range(300)
    ]
    task, _ = accepted(init_project(write_rows("reviews.csv", rows)))
    assert task.answer.labels == ("1", "2", "3", "4", "5")
    assert {e.label for e in task.exemplars} == set("12345")


def test_spam_with_the_columns_of_a_spreadsheet() -> None:
    draw = random.Random(4)
    rows = [{"v1": ("ham", "ham", "spam")[n % 3], "v2": sentence(draw), "Unnamed: 2": ""} for n in range(300)]
    project = init_project(write_rows("spam.csv", rows))
    task, _ = accepted(project)
    assert (project.label, project.inputs) == ("v1", ("v2",))
    assert task.prompt == "V2: {input}\nReasoning:"


def test_a_table_of_numbers_is_read_by_names_with_a_warning() -> None:
    draw = random.Random(5)
    names = ("sepal length (cm)", "sepal width (cm)")
    rows = [{"": n, **{name: round(draw.uniform(1, 8), 1) for name in names}, "target": n % 3} for n in range(150)]
    project = init_project(write_rows("iris.csv", rows), labels=["setosa", "versicolor", "virginica"])
    task, examples = accepted(project)
    assert project.inputs == names
    assert task.answer.values == {"0": "setosa", "1": "versicolor", "2": "virginica"}
    assert examples[0]["input"].startswith("Sepal length (cm): ")
    assert any("other models are better" in note for note in project.notes)


def test_questions_with_columns_of_choices() -> None:
    draw = random.Random(6)
    rows = [
        {"question": sentence(draw), **{sign: sentence(draw, 2) for sign in "ABCD"}, "answer": draw.choice("ABC")}
        for _ in range(200)
    ]
    task, _ = accepted(init_project(write_rows("quiz.csv", rows)))
    assert task.answer.labels == ("A", "B", "C", "D")
    assert task.input == "{question}\nAnswer Choices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}"


def test_the_quickstarts_own_file_gives_the_quickstarts_own_task() -> None:
    project = init_project(str(PACKAGE / "quickstart/data/train.jsonl"), name="desk")
    task, examples = accepted(project)
    assert (project.inputs, project.label) == (("message",), "decision")
    assert set(task.answer.labels) == set(load_task("returns_desk").answer.labels)
    assert Counter(e.label for e in task.exemplars) == dict.fromkeys(task.answer.labels, 2)
    assert len(examples) == 600


@pytest.mark.parametrize(
    ("file", "kind", "label", "inputs", "rows"),
    [
        ("cqa/cqa_train.json", "row_choice", "answer", ("question", "choices"), 9741),
        ("svamp/SVAMP.json", "expression", "Answer", ("Body", "Question"), 1000),
        ("svamp/svamp_train.json", "expression", "label", ("input",), 800),
        ("esnli/esnli_valid.json", "choice", "label", ("premise", "hypothesis"), 1000),
        ("anli1/anli1_valid.json", "choice", "label", ("premise", "hypothesis"), 1000),
    ],
)
def test_the_sets_of_the_paper(file: str, kind: str, label: str, inputs: tuple[str, ...], rows: int) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}; STEPDISTILL_REFERENCE can name another folder")
    project = init_project(str(REFERENCE / file), name="set")
    task, examples = accepted(project)
    assert (project.kind, project.label, project.inputs, project.exemplars) == (kind, label, inputs, 8)
    assert len(examples) == rows
    assert not {e.input[inputs[0]] for e in task.exemplars} & {"", None}


# what is written


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet"])
def test_every_form_of_file_gives_the_same_task(name: str) -> None:
    task, _ = accepted(init_project(write_rows(name, rows_of(["a", "b"]))))
    assert task == accepted(init_project(write_rows("other.csv", rows_of(["a", "b"])), name="rows", force=True))[0]


@pytest.mark.parametrize(
    "labels",
    [
        ["yes", "no"],
        ["on", "off", "y", "n", "true"],
        ["null", "~", "none"],
        ["1", "1.0", "0x1f", "1_000", "12:30", "1e5"],
        ["2024-01-01x", "<<", "=", "- a", "a: b", "#c", "&d", "*e", "!f", "%g", "@h", "`i", "[j]", "'k'", '"l"'],
        ["{label}", "{}", "{0}", "a{b", "c}d"],
        ["grün", "赤", "🧾", "e\u0301", "\u200eltr"],
        ["a\u2028b", "a\x85c", "a\x07d", "\ufeffe"],
        ["So the answer is a", "TODO"],
        ["{{ 7 * 7 }}", "{% raw %}", "{# x #}"],
        ["x" * 300, "y" * 300],
    ],
)
def test_labels_come_back_as_the_texts_that_they_are(labels: list[str]) -> None:
    project = init_project(write_rows("rows.jsonl", rows_of(labels, 40 * len(labels))), label_column="label")
    task, examples = accepted(project)
    assert set(task.answer.labels) == {" ".join(label.split()) for label in labels}
    assert {row["label"] for row in examples} == set(task.answer.labels)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    labels=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=5, unique_by=normalise_answer),
    column=st.text(max_size=12).filter(lambda name: name not in ("label", "n")),
    texts=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=9),
)
@example(labels=["a", "b"], column="Customer message (EN)", texts=["{x} # - : \n\n  y", " \n lead", "tail \nx\u2028y"])
def test_whatever_stands_in_a_file_is_refused_or_read_back(labels: list[str], column: str, texts: list[str]) -> None:
    rows = [
        {column: f"{n} {texts[n % len(texts)]}", "label": labels[n % len(labels)], "n": n}
        for n in range(30 * len(labels))
    ]
    file = write_rows("rows.jsonl", rows)
    try:
        project = init_project(file, [column], "label", labels=labels, force=True)
    except UserError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "\n" not in refused
        return
    task, examples = accepted(project)
    assert task.answer.labels == tuple(" ".join(label.split()) for label in labels)
    assert len(examples) == len(rows)
    by_id = {example["row_id"]: example for example in examples}
    for exemplar in task.exemplars:
        assert by_id[task.row_id(task.render(exemplar.input))]["label"] == exemplar.label


def test_a_file_with_its_test_missing_is_scored_on_validation() -> None:
    project = init_project(write_rows("rows.csv", rows_of(["a", "b"])))
    recipe = load_recipe(project.recipe)
    assert (recipe.source.train, recipe.source.test, recipe.source.validation) == ("rows.csv", None, None)
    assert recipe.evaluate.split == "validation"
    assert recipe.source.validation_share == VALIDATION_SHARE
    assert "# test: test.csv" in Path(project.recipe).read_text()


def test_gpus_and_a_teacher_stand_in_the_recipe() -> None:
    file = write_rows("rows.csv", rows_of(["a", "b"]))
    recipe = load_recipe(init_project(file, teacher="org/model", gpus=4).recipe)
    assert (recipe.teacher.model, recipe.teacher.gpus, recipe.student.gpus) == ("org/model", 4, 1)
    recipe = load_recipe(init_project(file, force=True).recipe)
    assert (recipe.teacher.gpus, recipe.student.gpus) == (0, 0)


def test_a_folder_is_made_and_stands_in_the_paths() -> None:
    project = init_project(write_rows("rows.csv", rows_of(["a", "b"])), folder="my work/deep")
    assert project.task == "my work/deep/rows.yaml"
    assert load_recipe(project.recipe).task == project.task
    accepted(project)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("rows.csv", "rows"),
        ("SMS Spam (v2).csv", "sms-spam-v2"),
        ("cqa_train.jsonl", "cqa"),
        ("mood/data/train.jsonl", "mood"),
        ("mood/данные.csv", "mood"),
        ("a.b.jsonl", "a"),
    ],
)
def test_a_name_is_made_of_the_files(file: str, name: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    assert init_project(write_rows(file, rows_of(["a", "b"]))).task == f"{name}.yaml"


def test_files_that_are_there_are_kept() -> None:
    file = write_rows("rows.csv", rows_of(["a", "b"]))
    Path("rows-recipe.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"rows-recipe.yaml: is there already; --force overwrites it"):
        init_project(file)
    assert Path("rows-recipe.yaml").read_text() == "mine"
    assert not Path("rows.yaml").exists()
    accepted(init_project(file, force=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "../x"}, r"--name \.\./x: a name is made of"),
        ({"name": ".x"}, "--name"),
        ({"folder": "rows.csv"}, "--folder rows.csv: nothing can be written there: File exists"),
        ({"folder": "rows.csv/x"}, "--folder rows.csv/x: nothing can be written there: Not a directory"),
    ],
)
def test_where_nothing_can_be_written(options: Row, said: str) -> None:
    with pytest.raises(UserError, match=said):
        init_project(write_rows("rows.csv", rows_of(["a", "b"])), **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": None}, r"rows.jsonl, row 8: no 'text'; fill it in"),
        ({"text": " \n"}, r"rows.jsonl, row 8: the input is empty"),
        ({"label": "c"}, r"rows.jsonl, row 8: label 'c' is not one of a, b; correct it"),
    ],
)
def test_a_row_that_a_run_would_refuse_is_named(change: Row, said: str) -> None:
    rows = rows_of(["a", "b"])
    rows[7] |= change
    file = write_rows("rows.jsonl", rows)
    with pytest.raises(UserError, match=said):
        init_project(file, label_column="label", labels=["a", "b"])
    assert not Path("rows.yaml").exists()


def test_rows_without_a_label_are_told_of_and_accepted() -> None:
    rows = rows_of(["a", "b", None])
    project = init_project(write_rows("rows.jsonl", rows))
    _, examples = accepted(project)
    assert sum(row["label"] is None for row in examples) == 66
    assert any("66 of 200 rows have no label" in note for note in project.notes)


def test_a_file_without_labels_is_unlabelled(capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(7)
    rows = [{"text": f"line one\n{sentence(draw)}"} for _ in range(50)]
    project = init_project(write_rows("pool.jsonl", rows), labels=["good", "bad"])
    task, examples = accepted(project)
    recipe = load_recipe(project.recipe)
    assert (project.label, task.exemplars, recipe.source.train) == (None, (), None)
    assert recipe.source.unlabelled == "pool.jsonl"
    assert {run.labels for run in recipe.students()} == {"teacher"}
    assert len(examples) == 50
    assert "distill rationales pool-recipe.yaml" in capsys.readouterr().out
    written = Path(project.task).read_text()
    shown = written[written.index("# exemplars:") :].replace("\n# ", "\n").removeprefix("# ")
    exemplar = yaml.safe_load(shown)["exemplars"][0]
    assert exemplar["input"] == rows[0]
    assert exemplar["label"] == "good"


# the exemplars


def test_exemplars_are_not_held_out_and_are_rows_of_the_file() -> None:
    rows = rows_of(["a", "b", "c"], 400)
    project = init_project(write_rows("rows.csv", rows))
    task, examples = accepted(project)
    held_out = {row["row_id"] for row in examples if position_in_unit(row["row_id"]) < VALIDATION_SHARE}
    assert held_out
    shown = [task.row_id(task.render(e.input)) for e in task.exemplars]
    assert set(shown) <= {row["row_id"] for row in examples} - held_out
    assert Counter(e.label for e in task.exemplars).most_common()[-1][1] >= 2
    numbers = [int(line.split()[-1]) for line in Path(project.task).read_text().splitlines() if "- # row" in line]
    assert [rows[number - 1]["label"] for number in numbers] == [e.label for e in task.exemplars]


def test_exemplars_are_of_middle_length() -> None:
    draw = random.Random(8)
    rows = [{"text": sentence(draw, words), "label": "ab"[n % 2]} for n in range(200) for words in (1, 20, 200)]
    task, _ = accepted(init_project(write_rows("rows.csv", rows)))
    assert {len(e.input["text"].split()) for e in task.exemplars} == {20}


def test_exemplars_are_not_near_duplicates() -> None:
    rows = [{"text": f"the same old words again and again {n}", "label": "ab"[n % 2]} for n in range(100)]
    rows += [{"text": f"something else entirely {n}", "label": "ab"[n % 2]} for n in range(10)]
    task, _ = accepted(init_project(write_rows("rows.csv", rows)))
    words = [set(e.input["text"].split()) for e in task.exemplars]
    assert len(words) == 2
    assert len(words[0] & words[1]) <= ALIKE * len(words[0] | words[1])


def test_every_label_has_an_exemplar_though_all_texts_are_alike() -> None:
    rows = [{"text": f"the same old words again and again {n}", "label": "abc"[n % 3]} for n in range(90)]
    task, _ = accepted(init_project(write_rows("rows.csv", rows)))
    assert sorted(e.label for e in task.exemplars) == ["a", "b", "c"]


def test_no_exemplar_is_in_the_validation_that_a_run_holds_out() -> None:
    project = init_project(write_rows("rows.csv", rows_of(["a", "b"], 300)))
    task, examples = accepted(project)
    shown = {task.row_id(task.render(e.input)) for e in task.exemplars}
    answers = [{"row_id": e["row_id"], "text": f"It says so. So the answer is {e['label']}."} for e in examples]
    write_rows("texts.jsonl", answers)
    line = Lineage(load_recipe(project.recipe, ["teacher={engine: outputs, outputs: {train: texts.jsonl}}"]))
    build_rationales(line)
    build_dataset(line)
    validation = {row["row_id"] for row in line.dataset.iter_rows("validation")}
    assert len(validation) > 10
    assert not validation & shown
    assert shown <= {row["row_id"] for row in line.dataset.iter_rows("train")}


def test_exemplars_of_very_long_texts_are_the_shorter_ones(capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(9)
    rows = [{"text": sentence(draw, 100 if n % 10 == 0 else 5000), "label": "ab"[n % 3 % 2]} for n in range(100)]
    project = init_project(write_rows("rows.jsonl", rows))
    task, _ = accepted(project)
    assert len(task.exemplars) > 2
    assert max(len(e.input["text"]) for e in task.exemplars) <= EXEMPLAR_CHARACTERS
    assert any("characters or more; a student cuts" in note for note in project.notes)
    assert len(max(capsys.readouterr().out.splitlines(), key=len)) < 250


def test_where_all_texts_are_very_long_the_shortest_is_the_exemplar() -> None:
    draw = random.Random(10)
    rows = [{"text": sentence(draw, 1000 + n), "label": "ab"[n % 2]} for n in range(60)]
    task, _ = accepted(init_project(write_rows("rows.jsonl", rows)))
    assert len(task.exemplars) == 1


def test_a_person_is_asked_for_the_rationales() -> None:
    project = init_project(write_rows("rows.csv", rows_of(["yes", "no"])))
    for exemplar in accepted(project)[0].exemplars:
        assert exemplar.rationale.full == f"TODO: why is it {exemplar.label}?"


def test_a_teacher_proposes_the_rationales() -> None:
    asked: list[str] = []

    def propose(prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        answers = ["<think>hm</think>It speaks of\na refund: {x}.", "", "Its words. So the answer is a.\n\nMore."]
        return [answers[n % 3] for n in range(len(prompts))]

    file = write_rows("rows.csv", rows_of(["a", "b"]))
    project = init_project(file, teacher="org/model", propose=propose)
    task, _ = accepted(project)
    assert len(asked) == len(task.exemplars) == 8
    for exemplar, prompt in zip(task.exemplars, asked, strict=True):
        assert task.render(exemplar.input) in prompt
        assert f"The answer is {exemplar.label}." in prompt
        assert "one to three sentences" in prompt
    said = [exemplar.rationale.full for exemplar in task.exemplars[:3]]
    assert said == ["It speaks of a refund: {x}.", f"TODO: why is it {task.exemplars[1].label}?", "Its words."]
    assert Path(project.task).read_text().count("# proposed by org/model; check before use") == 5


def test_the_prompt_that_is_proposed_is_read_back() -> None:
    task, examples = accepted(init_project(write_rows("rows.csv", rows_of(["a", "b {x}", "a b"]))))
    prompt = completion_prompt(task, examples[0]["input"])
    assert prompt.endswith(f"Text: {examples[0]['input']}\nReasoning:")
    for label in task.answer.labels:
        assert read_reply(task, completion(task, "It says so.", label)).label == label


# what is shown


def test_what_is_shown_of_a_file_is_no_markup_and_no_escape(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(["[/b]", "[red]x", "\x1b[31mred"])
    project = init_project(write_rows("[bold].jsonl", [{**row, "/x": "[/y]" + row["text"]} for row in rows]))
    said = capsys.readouterr().out
    assert "[/b]" in said
    assert "[bold].jsonl" in said
    assert "\x1b[31mred" not in said
    accepted(project)


def test_the_same_file_gives_the_same_project() -> None:
    file = write_rows("rows.csv", rows_of(["a", "b"]))
    first = Path(init_project(file).task).read_text()
    assert Path(init_project(file, force=True).task).read_text() == first


def test_too_few_rows_are_told_of() -> None:
    project = init_project(write_rows("rows.csv", rows_of(["a", "b"], 12)))
    assert any("too few to tell students apart" in note for note in project.notes)
    accepted(project)


def test_a_model_that_converses_is_asked_in_turns() -> None:
    file = write_rows("t.jsonl", rows_of(["a", "b"]))
    shipped = load_recipe(init_project(file, name="one").recipe).teacher
    assert (shipped.prompt, shipped.chat_template_args) == ("chat", {"enable_thinking": False})
    base = load_recipe(init_project(file, name="two", teacher="meta-llama/Llama-3.1-8B").recipe).teacher
    assert (base.prompt, base.chat_template_args) == ("completion", {})
    tuned = load_recipe(init_project(file, name="three", teacher="google/gemma-2-9b-it").recipe).teacher
    assert (tuned.prompt, tuned.chat_template_args) == ("chat", {})
