"""The user's mistakes: one sentence on stderr that names what is at fault, exit code 2, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.cli import main

Recipe = dict[str, object]

TASK = {
    "name": "mood",
    "input": "{text}",
    "answer": {"kind": "choice", "labels": ["good", "bad"]},
    "exemplars": [{"input": {"text": "Fine day."}, "rationale": "A fine day is good.", "label": "good"}],
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with two rows of its own and texts that are given."""
    rows = [{"text": "I am glad.", "label": "good"}, {"text": "I am sad.", "label": "bad"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = ["Glad is a good thing. So the answer is good.", "Sad is not a good thing. So the answer is good."]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    content = {
        "name": "mine",
        "storage": str(tmp_path / "runs"),
        "task": str(tmp_path / "task.yaml"),
        "source": {"root": str(tmp_path), "train": "train.jsonl"},
        "teacher": {"engine": "outputs", "outputs": {"train": "texts.json"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `distill ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["distill", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, *overrides: str) -> str:
    """The sentence by which `distill rationales` refuses."""
    arguments = [part for override in overrides for part in ("--set", override)]
    assert call(monkeypatch, "rationales", str(recipe), *arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_rationales_from_given_texts_end_in_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert call(monkeypatch, "rationales", str(recipe), "--json") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["artifacts"][0]
    assert made["funnel"] == {"train": {"accepted": 1, "disagrees_with_gold": 1}}
    assert made["teacher_accuracy"] == {"train": {"accuracy": 0.5, "rows": 2}}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("teachr.model=x", "'teacher'"),
        ("teacher.modle=x", "'model'"),
        ("student.steps=many", "student.steps"),
        ("student.precision=fp16", "student.precision"),
        ("source.train=absent.jsonl", "absent.jsonl"),
        ("task=absent.yaml", "absent.yaml"),
        ("teacher.outputs={train: absent_*.json}", "absent_*.json"),
        ("storage=nowhere://x", "nowhere"),
        ("search.space={fraction: 1.5}", "search.space.0.fraction"),
        ("search.space={alpha: [0.5, -0.1]}", "search.space.0.alpha"),
        ("search.space={alpha: []}", "search.space.0.alpha"),
        ("search.space=[]", "search.space"),
        ("search.metric=bleu", "'search.metric'"),
    ],
)
def test_mistakes_in_the_recipe_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, override: str, named: str
) -> None:
    assert named in refusal(monkeypatch, capsys, recipe, override)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no rows"),
        (b'{"text": "a", "label": "good"}\nnot json', "line 2"),
        (b'{"text": "a", "label": "good"}\n{"text": "\xff", "label": "bad"}', "line 2"),
        (b'{"text": "a", "label": "grand"}', "'grand'"),
        (b'{"body": "a", "label": "good"}', "'text'"),
        (b'["a"]', "row 1"),
    ],
)
def test_mistakes_in_the_source_name_file_and_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path, content: bytes, named: str
) -> None:
    (recipe.parent / "train.jsonl").write_bytes(content)
    said = refusal(monkeypatch, capsys, recipe)
    assert named in said
    assert "train.jsonl" in said


def test_a_missing_model_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert "./absent" in refusal(monkeypatch, capsys, recipe, "teacher={engine: vllm, model: ./absent}")


def test_texts_by_position_must_be_as_many_as_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    (recipe.parent / "texts.json").write_text('["one alone"]')
    said = refusal(monkeypatch, capsys, recipe)
    assert "1 texts" in said
    assert "2 rows" in said


def test_a_stage_without_its_parent_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert call(monkeypatch, "dataset", str(recipe)) == 2
    assert "distill rationales" in capsys.readouterr().err


def test_python_m_pipelines_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", "absent"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("distill: recipe 'absent' is neither a file nor one of")
