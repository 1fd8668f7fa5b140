"""The report over real artefacts, written as the stages write them; no Ray, no model."""

import csv
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.artifact import Artifact
from pipelines.errors import UserError
from pipelines.lineage import Lineage
from pipelines.recipe import Run
from pipelines.report import CSV_COLUMNS, build_report
from pipelines.schema import Reason
from tests.report.artefacts import (
    ROWS,
    STANDARD,
    STEP,
    TEACHER,
    TWO_ARMS,
    lineage,
    write,
    write_evaluation,
    write_student,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """One seed, both arms, 20 of 200 rows better with rationales; reported on."""
    right, validation = {STANDARD: 140, STEP: 160}, {STANDARD: 0.8, STEP: 0.7}
    line = write(lineage(tmp_path_factory.mktemp("small"), [TWO_ARMS]), right, validation)
    build_report(line)
    return line


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """Two fractions, on which all students do alike."""
    line = lineage(tmp_path_factory.mktemp("curve"), [TWO_ARMS | {"fraction": [0.5, 1.0]}])
    write(line, dict.fromkeys(line.recipe.students(), 150))
    build_report(line)
    return line


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """Rationales that hurt, texts that were given, none of them for test, and every reason to refuse one."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "texts.json").write_text('["So the answer is refund."]', encoding="utf-8")
    line = lineage(folder, [TWO_ARMS], teacher={"engine": "outputs", "outputs": {"train": "texts.json"}})
    accepted = 100 - len(Reason)
    funnel = {"train": {"accepted": accepted, **dict.fromkeys(map(str, Reason), 1)}, "unlabelled": {"accepted": 7}}
    write(line, {STANDARD: 160, STEP: 140}, funnel=funnel, teacher={"train": TEACHER["train"]})
    build_report(line)
    return line


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    """Both arms with two seeds."""
    right = {Run(arm="standard", seed=0): 130, Run(arm="standard", seed=1): 150}
    right |= {Run(arm="step_by_step", seed=0): 150, Run(arm="step_by_step", seed=1): 160}
    line = write(lineage(tmp_path_factory.mktemp("seeds"), [TWO_ARMS | {"seed": [0, 1]}]), right)
    build_report(line)
    return line


def page_of(artifact: Artifact) -> str:
    return Path(artifact.path("report.html")).read_text(encoding="utf-8")


def words_of(artifact: Artifact) -> str:
    """What the page says, without its marks."""
    text = re.sub(r"<(style|svg)\b.*?</\1>", " ", page_of(artifact), flags=re.DOTALL)
    text = text.replace("<wbr>", "")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def csv_of(artifact: Artifact) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(artifact.path("results.csv")).read_text(encoding="utf-8"))))


def test_the_table_holds_what_was_measured(small: Lineage) -> None:
    manifest = small.report().manifest()
    standard, step = manifest["table"]
    assert standard["accuracy"] == pytest.approx({"mean": 0.7, "low": 0.64, "high": 0.75})
    assert (standard["gain"], standard["examples"], standard["rationales"], standard["seeds"]) == (None, 100, 0, [0])
    assert step["accuracy"] == pytest.approx({"mean": 0.8, "low": 0.74, "high": 0.85})
    assert step["gain"]["mean"] == 0.1
    # 20 of 200 rows gained, none lost: the percentiles of Binomial(200, 0.1) / 200
    assert step["gain"]["low"] == pytest.approx(0.06, abs=0.01)
    assert step["gain"]["high"] == pytest.approx(0.145, abs=0.01)
    assert manifest["teacher"] == pytest.approx({"mean": 0.84, "low": 0.7828, "high": 0.8844, "rows": ROWS}, abs=1e-3)
    assert (manifest["split"], manifest["rows"]) == ("test", ROWS)
    said = words_of(small.report())
    assert "standard chosen 0 1 70.0 64.0 to 75.0 –" in said
    assert "step_by_step 70 1 80.0 74.0 to 85.0 +10.0" in said
    assert "teacher – – 84.0 78.3 to 88.4" in said
    assert "100 gold labels" in said


def test_the_best_is_chosen_on_validation_never_on_test(small: Lineage, capsys: pytest.CaptureFixture[str]) -> None:
    best = build_report(small).manifest()["best"]  # step_by_step is better on test
    model = small.student(STANDARD).file_uri("model")
    assert (best["student"], best["validation_score"], best["model"]) == (STANDARD.name, 0.8, model)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f'distill predict {model} "an input"')


def test_csv_has_a_line_a_student_and_one_for_the_teacher(curve: Lineage) -> None:
    rows = csv_of(curve.report())
    assert list(rows[0]) == CSV_COLUMNS
    assert [(r["kind"], r["arm"], r["fraction"]) for r in rows] == [
        ("student", "standard", "0.5"),
        ("student", "step_by_step", "0.5"),
        ("student", "standard", "1.0"),
        ("student", "step_by_step", "1.0"),
        ("teacher", "", ""),
    ]
    first, teacher = rows[0], rows[-1]
    assert (first["examples"], first["rows"], float(first["accuracy"])) == ("50", "200", 0.75)
    assert (first["best_step"], first["parameters"], first["train_seconds"]) == ("40", "1234567", "7.5")
    assert (teacher["split"], teacher["rows"], float(teacher["accuracy"])) == ("test", "200", 0.84)
    assert rows[3]["rationales"] == "70"


class Outside(HTMLParser):
    """Collects whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "img", "object", "embed", "base", "form"):
            self.found.append(tag)
        for name, value in attrs:
            local = (value or "").startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "srcset", "action") and not local:
                self.found.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.found.append(f"{tag} {name}")


def test_the_page_fetches_nothing(small: Lineage) -> None:
    page = page_of(small.report())
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert "@import" not in page
    assert re.findall(r"url\((?!#)[^)]*\)", page) == []
    assert re.findall(r"https?://[^\"' )]+", page) == []
    assert page.count("<svg") == 4  # two figures, each drawn for desks and for phones
    assert "prefers-color-scheme: dark" in page


def test_text_of_recipe_and_task_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "name: t\ndescription: \"<script>alert('x')</script> & ünï \\u202e 衣 🧵\"\n"
        "input: '{text}'\nanswer: {kind: choice, labels: [refund, decline]}\n",
        encoding="utf-8",
    )
    line = lineage(tmp_path, [TWO_ARMS], teacher={"model": '"><img src=x onerror=y>'})
    page = page_of(build_report(write(line, {STANDARD: 140, STEP: 150})))
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; ünï \u202e 衣 🧵" in page
    assert "&#34;&gt;&lt;img src=x onerror=y&gt;" in page


def test_a_teacher_that_was_not_asked_is_left_out_and_that_is_said(
    odd: Lineage, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = build_report(odd)
    assert artifact.manifest()["teacher"] is None
    assert [row["kind"] for row in csv_of(artifact)] == ["student", "student"]
    said = words_of(artifact)
    assert "The teacher was not asked for test, so its row is left out." in said
    assert "the teacher's interval" not in said
    assert "the teacher was not asked for test" in capsys.readouterr().out


def test_one_arm_alone(tmp_path: Path) -> None:
    artifact = build_report(write(lineage(tmp_path, [{"arm": "standard"}]), {STANDARD: 140}))
    assert artifact.manifest()["verdict"]["effect"] == "untested"
    said = words_of(artifact)
    assert "1 small student " in said
    assert "Whether rationales helped was not tested" in said
    assert "rationales not tested" in said


def test_two_seeds_are_averaged_and_drawn(seeds: Lineage) -> None:
    standard, step = seeds.report().manifest()["table"]
    assert standard["seeds"] == [0, 1]
    assert standard["accuracy"]["mean"] == 0.7
    assert standard["accuracy"]["low"] < 0.65 < 0.75 < standard["accuracy"]["high"]  # wider than either seed's spread
    assert step["gain"]["mean"] == 0.075  # (20 + 10) / 2 of 200
    said = words_of(seeds.report())
    assert "hierarchical bootstrap" in said
    assert "how much another seed would change" not in said
    assert "Seeds of students: 0, 1." in said


def test_one_seed_says_what_its_interval_does_not_show(small: Lineage) -> None:
    said = words_of(small.report())
    assert "With one seed a student they do not show how much another seed would change." in said
    assert "hierarchical" not in said


@pytest.mark.parametrize(
    ("run", "effect", "words"),
    [
        ("small", "helped", "Rationales helped here"),
        ("odd", "hurt", "Rationales hurt here"),
        ("curve", "undecided", "no difference here that the interval can tell apart from zero"),
    ],
)
def test_the_verdict(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], run: str, effect: str, words: str
) -> None:
    artifact = build_report(request.getfixturevalue(run))
    assert artifact.manifest()["verdict"]["effect"] == effect
    assert words in words_of(artifact)
    assert words in " ".join(capsys.readouterr().out.split())


def test_the_funnel_tells_every_reason(odd: Lineage) -> None:
    said = words_of(odd.report())
    assert "asked for 100 7" in said
    accepted = 100 - len(Reason)
    assert f"accepted {accepted} {accepted}.0 % 7 100.0 %" in said
    for reason in Reason:
        assert reason.value in said
    assert "no answer could be read from the text 1 1.0 % 0" in said


def test_cost_and_provenance(small: Lineage) -> None:
    said = words_of(small.report())
    assert "teacher 300 texts 120,000 read 9,000 written 0.01 of engines –" in said
    assert "students training of 2 students 6,000 read 2,000 written 0.00556 of workers –" in said
    assert "teacher of an engine, many at a time 2 min 0 s 30,000 –" in said
    assert "chosen student of a replica, one at a time 12 s 0 –" in said
    assert "2 students; 15 s of it in training steps" in said
    for key in (small.generations.key, small.dataset.key, small.student(STEP).key, small.evaluation(STEP).key):
        assert key in said
    assert small.report().manifest()["evaluations"] == {run.name: small.evaluation(run).key for run in (STANDARD, STEP)}
    assert "some/student" in said


def test_given_outputs_have_no_tokens(odd: Lineage) -> None:
    said = words_of(odd.report())
    assert "given and not generated here" in said
    assert "tokens in" not in said
    assert "tokens a second" not in said


def test_validation_as_the_split_is_said_to_flatter(tmp_path: Path) -> None:
    line = lineage(tmp_path, [TWO_ARMS], evaluate={"split": "validation"})
    said = words_of(build_report(write(line, {STANDARD: 140, STEP: 150})))
    assert "these accuracies flatter the students" in said
    assert "had no part in the choice" not in said


def test_figures(curve: Lineage) -> None:
    svg = Path(curve.report().path("accuracy.svg")).read_text(encoding="utf-8")
    for text in (
        "labelled examples learnt from",
        "right on test, %",
        "standard, gold labels",
        "teacher",
        ">50<",
        ">100<",
    ):
        assert text in svg
    assert Path(curve.report().path("accuracy.png")).read_bytes().startswith(b"\x89PNG")


def test_what_a_search_tried_is_told(searched: Artifact) -> None:
    said = words_of(searched)
    assert "Against alpha" in said
    assert "step_by_step chosen gold labels, 25 % 0.75" in said
    assert "Accuracy against student size" in said
    assert "617,000 or 1,234,567 parameters" in said
    assert "25 students tried; trained, chosen and scored" in said
    assert "training of 25 students, all that the search tried" in said
    assert "step_by_step alpha 0.5 teacher some/other-teacher" in said
    assert "another teacher some/other-teacher – – 90.0 85.1 to 93.4" in said
    for name in ("accuracy", "size", "alpha", "confidence"):
        assert Path(searched.path(f"{name}.png")).read_bytes().startswith(b"\x89PNG")
        assert Path(searched.path(f"{name}.svg")).read_text(encoding="utf-8").startswith("<?xml")
    assert ">617,000<" in Path(searched.path("size.svg")).read_text(encoding="utf-8")
    assert "weight of the label loss" in Path(searched.path("alpha.svg")).read_text(encoding="utf-8")


def test_rows_that_were_left_out_and_held_out_are_told(searched: Artifact) -> None:
    said = words_of(searched)
    assert "train: 90 rows; 7 stand in another split and were left out" in said
    assert "3 nearly repeat a row of validation or test and were left out" in said
    assert "No validation split was given: 9 rows of train" in said


def test_what_was_rejected_is_shown(searched: Artifact) -> None:
    said = words_of(searched)
    assert "unparsable: 1 example" in said
    assert "I would rather not say." in said


def test_the_same_artefacts_make_the_same_files(seeds: Lineage) -> None:
    artifact = seeds.report()
    names = ("report.html", "results.csv", "accuracy.svg")
    first = {name: Path(artifact.path(name)).read_bytes() for name in names}
    build_report(seeds, force=True)
    assert {name: Path(artifact.path(name)).read_bytes() for name in names} == first


def test_done_before_is_skipped_and_shown_again(small: Lineage, capsys: pytest.CaptureFixture[str]) -> None:
    finished = small.report().manifest()
    assert build_report(small).manifest() == finished
    said = capsys.readouterr().out
    assert "done before, skipped" in said
    assert "step_by_step" in said
    assert "80.0 (74.0…85.0)" in said


def test_missing_parents_name_the_command(tmp_path: Path) -> None:
    line = lineage(tmp_path, [TWO_ARMS])
    with pytest.raises(UserError, match="run `distill train` first"):
        build_report(line)
    for run in (STANDARD, STEP):
        write_student(line, run, 0.5)
    write_evaluation(line, STANDARD, 100)
    with pytest.raises(UserError, match="run `distill evaluate` first"):
        build_report(line)
    write_evaluation(line, STEP, 100)
    with pytest.raises(UserError, match="run `distill rationales` first"):
        build_report(line)
    assert not line.report().done()


def test_predictions_on_other_rows_are_refused(tmp_path: Path) -> None:
    line = write(lineage(tmp_path, [TWO_ARMS]), {STANDARD: 140, STEP: 150})
    write_evaluation(line, STEP, 100, rows=ROWS - 1)
    with pytest.raises(RuntimeError, match="not the rows of the other students"):
        build_report(line)


def test_the_manifest_is_plain_json(small: Lineage) -> None:
    json.loads(Path(small.report().path("manifest.json")).read_text(encoding="utf-8"), parse_constant=pytest.fail)
