"""The arms' targets, and the loss by its definition."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, MT5Config, T5Config, UMT5Config

from pipelines.draw import Rationale, TrainRow
from pipelines.errors import UserError
from pipelines.recipe import Arm, resolve
from pipelines.student import LABEL, RATIONALE, Batch, Collator, Objective, load_student, save_student

pytestmark = pytest.mark.slow  # it loads transformers

Student = tuple[Any, Any]  # model and tokenizer
Gradients = dict[str, torch.Tensor]

FAULTY, UNWANTED = "The lamp does not work, so it is faulty.", "Nothing is wrong, so it is unwanted. It is 40 days old."
ROWS = [
    TrainRow("a", "The lamp stopped working.", "refund", (Rationale(FAULTY, "t1", 0.5),), 0.6),
    TrainRow("b", "I changed my mind.", "decline", (Rationale(UNWANTED, "t2", 0.9),), 0.8),
    TrainRow("c", "My dog chewed it.", "repair"),
]


@pytest.fixture(scope="module")
def student() -> Student:
    model, tokenizer = load_student(resolve("builtin:quickstart/student"))
    return model.eval(), tokenizer


def collator(student: Student, arm: Arm = "step_by_step", inputs: int = 64, targets: int = 64, **more: Any) -> Collator:
    return Collator(*student, arm, inputs, targets, **more)


def read(student: Student, batch: Batch) -> list[tuple[str, str]]:
    """(input, target) of every row, as text; without its last end of sequence."""

    def text(ids: torch.Tensor) -> str:
        return str(student[1].decode(ids)).removesuffix("</s>").strip()

    sources = batch.inputs.ids.split(batch.inputs.lengths)
    targets = batch.targets.split(batch.previous.lengths)
    return [(text(source), text(target)) for source, target in zip(sources, targets, strict=True)]


LABELS = [
    ("predict: The lamp stopped working.", "refund"),
    ("predict: I changed my mind.", "decline"),
    ("predict: My dog chewed it.", "repair"),
]
RATIONALES = [("explain: The lamp stopped working.", FAULTY), ("explain: I changed my mind.", UNWANTED)]


def test_two_tasks_from_one_input_told_apart_by_prefix(student: Student) -> None:
    batch = collator(student)(ROWS)
    assert read(student, batch) == LABELS + RATIONALES
    assert batch.tasks.tolist() == [LABEL] * sum(batch.previous.lengths[:3]) + [RATIONALE] * sum(
        batch.previous.lengths[3:]
    )


def test_standard_learns_labels_alone(student: Student) -> None:
    bare = [replace(row, rationales=()) for row in ROWS]  # as `draw_rows` gives them
    batch = collator(student, "standard")(bare)
    assert read(student, batch) == LABELS
    assert set(batch.tasks.tolist()) == {LABEL}


def test_one_target_holds_both_in_either_order(student: Student) -> None:
    inputs = [source for source, _ in LABELS]
    first, last = (read(student, collator(student, arm)(ROWS)) for arm in ("label_first", "rationale_first"))
    assert [source for source, _ in first] == [source for source, _ in last] == inputs
    assert [target for _, target in first] == [f"refund</s>{FAULTY}", f"decline</s>{UNWANTED}", "repair"]
    assert [target for _, target in last] == [f"{FAULTY}</s>refund", f"{UNWANTED}</s>decline", "repair"]


def test_shuffled_rationales_keep_their_tokens_and_their_end_and_nothing_else(student: Student) -> None:
    plain, shuffled = (collator(student, arm)(ROWS) for arm in ("step_by_step", "shuffled_rationale"))
    assert read(student, shuffled)[:3] == LABELS
    pairs = zip(*(b.targets.split(b.previous.lengths)[3:] for b in (plain, shuffled)), strict=True)
    for real, mixed in pairs:
        assert sorted(real.tolist()) == sorted(mixed.tolist())
        assert real.tolist() != mixed.tolist()
        assert mixed[-1] == student[1].eos_token_id
    again = collator(student, "shuffled_rationale")(ROWS[::-1])
    assert read(student, again)[3:] == read(student, shuffled)[3:][::-1], "each epoch the same"
    other = collator(student, "shuffled_rationale", seed=1)(ROWS)
    assert read(student, other)[3:] != read(student, shuffled)[3:]


def test_each_teacher_may_have_a_task_of_its_own(student: Student) -> None:
    both = replace(ROWS[0], rationales=(Rationale("one", "t1"), Rationale("two", "t2")))
    batch = collator(student, teachers=["t1", "t2"])([both])
    assert read(student, batch)[1:] == [
        ("explain as teacher 1: The lamp stopped working.", "one"),
        ("explain as teacher 2: The lamp stopped working.", "two"),
    ]


def test_with_the_prefix_in_the_decoder_inputs_are_read_once_and_bare(student: Student) -> None:
    batch = collator(student, prefix="decoder")(ROWS)
    sources = [student[1].decode(ids, skip_special_tokens=True) for ids in batch.inputs.ids.split(batch.inputs.lengths)]
    assert sources == [row.input for row in ROWS]
    assert batch.places is not None
    decode = student[1].decode
    start = "<pad>predict:"
    written = [decode(ids) for ids in batch.previous.ids.split(batch.previous.lengths)]
    assert written[0] == f"{start} refund<pad>explain: {FAULTY}"
    assert written[2] == f"{start} repair"
    assert decode(batch.targets[batch.tasks == LABEL]) == "refund</s>decline</s>repair</s>"


def test_the_decoder_sees_what_comes_before_each_target(student: Student) -> None:
    batch = collator(student)(ROWS)
    previous = batch.previous.ids.split(batch.previous.lengths)
    for before, target in zip(previous, batch.targets.split(batch.previous.lengths), strict=True):
        assert before.tolist() == [student[0].config.decoder_start_token_id, *target[:-1].tolist()]


def test_targets_end_with_the_end_of_sequence(student: Student) -> None:
    batch = collator(student, targets=5)(ROWS)
    ends = [row[-1].item() for row in batch.targets.split(batch.previous.lengths)]
    assert ends == [student[1].eos_token_id] * 5
    assert batch.previous.lengths[-2:] == [5, 5]


def test_a_long_rationale_never_costs_the_label(student: Student) -> None:
    """One target, cut as a whole, would lose it."""
    batch = collator(student, "rationale_first", targets=5)(ROWS[:1])
    assert read(student, batch)[0][1].endswith("refund")


def test_cut_rows_are_counted(student: Student) -> None:
    cut = collator(student, inputs=8, targets=8)
    assert cut(ROWS[:1]).inputs.lengths == [8, 8]
    assert cut.count_cut(ROWS) == (3, 2)
    assert collator(student).count_cut(ROWS) == (0, 0)


def test_a_label_is_never_cut(student: Student) -> None:
    with pytest.raises(UserError, match=r"row b: its label has \d+ tokens and student.max_target_tokens is 4"):
        collator(student, targets=4).count_cut([ROWS[0], replace(ROWS[1], label="neither one nor the other")])


# the loss


def mean_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Over tokens, each with its row's weight; of padded rows, -100 where there is no target."""
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    counted = (targets != -100) * weights[:, None]
    return (losses * counted).sum() / counted.sum()


def defined_loss(
    student: Student, rows: list[TrainRow], alpha: float, weigh: bool = False, prefix: str = "encoder"
) -> torch.Tensor:
    """`alpha * label loss + (1 - alpha) * rationale loss` to the letter: two passes of the model's own forward, each
    over padded rows, each loss the mean over its tokens."""
    model, tokenizer = student

    def task(told: str, texts: list[tuple[str, str, float]]) -> torch.Tensor:
        before = told if prefix == "encoder" else ""
        inputs = tokenizer([before + source for source, _, _ in texts], padding=True, return_tensors="pt")
        targets = tokenizer([target for _, target, _ in texts], padding=True, return_tensors="pt")
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
        weights = torch.tensor([weight if weigh else 1.0 for _, _, weight in texts])
        if prefix == "encoder":
            if not weigh:
                loss: torch.Tensor = model(**inputs, labels=labels).loss
                return loss
            return mean_loss(model(**inputs, labels=labels).logits, labels, weights)
        opening = torch.tensor([tokenizer(told)["input_ids"][:-1]]).expand(len(texts), -1)
        start = torch.full((len(texts), 1), model.config.decoder_start_token_id)
        written = torch.cat([start, opening, targets["input_ids"][:, :-1]], dim=1)
        logits = model(**inputs, decoder_input_ids=written).logits[:, opening.shape[1] :]
        return mean_loss(logits, labels, weights)

    label = task("predict: ", [(row.input, row.label, row.agreement) for row in rows])
    rationale = task("explain: ", [(row.input, r.text, r.agreement) for row in rows for r in row.rationales])
    return alpha * label + (1 - alpha) * rationale


def gradients_of(model: Any) -> Gradients:
    made = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return made


def assert_same(mine: Gradients, expected: Gradients) -> None:
    for name, gradient in expected.items():
        assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0])
@pytest.mark.parametrize("prefix", ["encoder", "decoder"])
@pytest.mark.parametrize("weigh", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(
    student: Student, alpha: float, prefix: str, weigh: bool
) -> None:
    model = student[0]
    expected = defined_loss(student, ROWS, alpha, weigh, prefix)
    expected.backward()
    gradients = gradients_of(model)
    batch = collator(student, prefix=prefix, by_agreement=weigh)(ROWS)
    objective = Objective(model, alpha)
    loss, sums = objective(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients_of(model), gradients)
    parts = objective.losses(sums, batch.totals())
    assert parts["loss"] == pytest.approx(loss.item(), rel=1e-6)
    told = alpha * parts["label_loss"] + (1 - alpha) * parts["rationale_loss"]
    assert told == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("prefix", ["encoder", "decoder"])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(student: Student, prefix: str) -> None:
    """The parts have other shares of labels, rationales and tokens than the whole; one has no rationale at all."""
    model = student[0]
    expected = defined_loss(student, ROWS, 0.3, prefix=prefix)
    expected.backward()
    gradients = gradients_of(model)
    collate = collator(student, prefix=prefix)
    parts = [collate(part) for part in (ROWS[:1], ROWS[1:2], ROWS[2:])]
    totals = torch.stack([part.totals() for part in parts]).sum(dim=0)
    objective = Objective(model, 0.3)
    made = [objective(part, totals) for part in parts]
    for loss, _ in made:
        loss.backward()
    assert sum(loss.item() for loss, _ in made) == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients_of(model), gradients)
    sums = torch.stack([sums for _, sums in made]).sum(dim=0)
    assert objective.losses(sums, totals)["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("arm", ["label_first", "rationale_first"])
def test_one_target_is_one_mean_over_its_tokens(student: Student, arm: Arm) -> None:
    model, tokenizer = student
    row = ROWS[0]
    ids = {name: tokenizer(text)["input_ids"] for name, text in {"label": row.label, "rationale": FAULTY}.items()}
    order = ("label", "rationale") if arm == "label_first" else ("rationale", "label")
    target = torch.tensor([ids[order[0]] + ids[order[1]]])
    inputs = tokenizer(["predict: " + row.input], return_tensors="pt")
    expected = model(**inputs, labels=target).loss
    batch = collator(student, arm)([row])
    objective = Objective(model, alpha=0.1)
    loss, sums = objective(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.losses(sums, batch.totals()) == {"loss": pytest.approx(loss.item(), rel=1e-6)}


def test_a_batch_without_rationales_has_the_label_loss_alone(student: Student) -> None:
    loss, sums = Objective(student[0], alpha=0.1)(collator(student)(ROWS[2:]))
    standard, _ = Objective(student[0], alpha=0.9)(collator(student, "standard")(ROWS[2:]))
    assert loss.item() == standard.item()
    assert sums[RATIONALE] == 0


def test_any_size_of_batch_is_one_pass_of_each_half(student: Student) -> None:
    """Under ZeRO 3 every worker must run as many passes, whatever its rows."""
    model = student[0]
    passes: list[str] = []
    hooks = [
        stack.final_layer_norm.register_forward_hook(lambda *_, name=name: passes.append(name))
        for name, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder()))
    ]
    for rows in (ROWS, ROWS[2:]):
        Objective(model, alpha=0.5)(collator(student)(rows))
    for hook in hooks:
        hook.remove()
    assert passes == ["encoder", "decoder"] * 2


# students


SMALL: dict[str, Any] = {
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 1056,
}


@pytest.mark.parametrize(
    ("config", "own_head"),
    [
        (T5Config(**SMALL), False),
        (T5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False), True),  # v1.1, Flan, ByT5
        (MT5Config(**SMALL), True),
        (UMT5Config(**SMALL), False),
    ],
)
def test_every_kind_of_t5_has_the_output_layer_it_should_and_comes_back_as_it_was_saved(
    config: Any, own_head: bool, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path / "shape")
    tokenizer = AutoTokenizer.from_pretrained(resolve("builtin:quickstart/student"))
    tokenizer.save_pretrained(tmp_path / "shape")
    model, _ = load_student(str(tmp_path / "shape"), init="random")
    assert (model.lm_head.weight is not model.shared.weight) == own_head
    save_student(model, tokenizer, tmp_path / "saved")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    inputs = tokenizer(["predict: The lamp stopped working."], return_tensors="pt")
    labels = tokenizer(["refund"], return_tensors="pt")["input_ids"]
    losses = [m.eval()(**inputs, labels=labels).loss.item() for m in (model, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    loss, _ = Objective(again, 0.5)(Collator(again, tokenizer, "standard", 64, 64)([replace(ROWS[0], rationales=())]))
    expected = again(**tokenizer(["predict: " + ROWS[0].input], return_tensors="pt"), labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("tied", "parameters"), [(True, 60_506_624), (False, 76_961_152)])
def test_parameter_counts_are_those_of_the_published_models(tied: bool, parameters: int, tmp_path: Path) -> None:
    """t5-small and google/t5-v1_1-small."""
    shape: dict[str, Any] = {"d_model": 512, "d_kv": 64, "vocab_size": 32128}
    shape |= (
        {"d_ff": 2048, "num_layers": 6, "num_heads": 8}
        if tied
        else {"d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
    )
    T5Config(**shape, tie_word_embeddings=tied).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve("builtin:quickstart/student")).save_pretrained(tmp_path)
    model, _ = load_student(str(tmp_path), init="random")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_random_initialisation_keeps_the_shape_and_follows_the_seed() -> None:
    path = resolve("builtin:quickstart/student")
    models = [load_student(path, init="random", seed=seed)[0] for seed in (1, 1, 2)]
    weights = [m.get_input_embeddings().weight for m in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_student_may_read_bytes(tmp_path: Path) -> None:
    """As ByT5 does."""
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    T5Config(vocab_size=384, decoder_start_token_id=0, **shape).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    student = load_student(str(tmp_path), init="random")
    batch = collator(student, inputs=256, targets=256)(ROWS)
    assert read(student, batch) == LABELS + RATIONALES
    assert batch.tokens == (
        sum(len(source.encode()) + 1 for source, _ in LABELS + RATIONALES),
        sum(len(target.encode()) + 1 for _, target in LABELS + RATIONALES),
    )
    loss, _ = Objective(student[0], 0.5)(batch)
    assert loss.isfinite()


def test_a_decoder_only_model_is_refused() -> None:
    with pytest.raises(UserError, match="is a llama; a student must be an encoder-decoder of the T5 family"):
        load_student(resolve("builtin:quickstart/teacher"))


def test_a_missing_model_is_refused_with_its_name() -> None:
    with pytest.raises(UserError, match="absent"):
        load_student("./absent")
