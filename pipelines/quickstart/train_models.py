"""Trains the quickstart's two tiny models and writes them beside this file, as Hugging Face directories.

teacher/   a Llama-architecture decoder, trained on chains of thought in the few-shot prompt form of
           `tasks/returns_desk.yaml`; only training frames, fresh messages from their own seed
student/   a T5-architecture model, trained to denoise messages (spans, and whole texts); it has seen
           neither a label nor a rationale

python -m pipelines.quickstart.train_models teacher|student [--steps N]
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pipelines.prompts import completion, completion_prompt, prompt_head
from pipelines.quickstart.returns_desk import TEACHER_FRAMES, Case, decide, explain, split, stream
from pipelines.replies import read_reply
from pipelines.tasks import Task, load_task

HERE = Path(__file__).parent
IGNORED = -100
SEED = 0
SENTINELS = 32

Batch = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["teacher", "student"])
    parser.add_argument("--steps", type=int, help="optimiser steps (default: teacher 2400, student 2500)")
    parser.add_argument("--out", type=Path, help="directory to write (default: beside this file)")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    task = load_task("returns_desk")
    out = args.out or HERE / args.model
    start = time.time()
    if args.model == "teacher":
        train_teacher(task, out, args.steps or 2400)
    else:
        train_student(task, out, args.steps or 2500)
    print(f"{args.model}: {time.time() - start:.0f} s on {torch.get_num_threads()} threads, written to {out}")


# ---------------------------------------------------------------- the teacher


def train_teacher(task: Task, out: Path, steps: int) -> None:
    """Few-shot sequences in the prompt's form, with the loss on what follows each `Reasoning:`."""
    tokenizer = make_tokenizer(
        itertools.chain(
            [prompt_head(task)] * 50,
            (text for text, _ in _documents(task, "returns-desk/teacher-tokenizer", 3000)),
        ),
        vocab_size=1024,
        special=["<pad>", "</s>", "<s>"],
        template="<s> $A",
    )
    tokenizer.model_max_length = 2048
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    batches = _teacher_batches(task, tokenizer)
    for _ in _optimise(model, batches, steps, lr=2e-3, every=400):
        save(model, tokenizer, out)
        print(f"   right on validation: {teacher_accuracy(task, model, tokenizer, 'validation', 100):.2f} of 100")
    save(model, tokenizer, out)
    for name in ("validation", "test"):
        print(f"teacher's labels right on {name}: {teacher_accuracy(task, model, tokenizer, name, 500):.3f} of 500")


def _documents(task: Task, seed: str, count: int) -> Iterator[tuple[str, str]]:
    """(prompt form of one message, completion), `count` times."""
    for message, case in itertools.islice(stream(seed, TEACHER_FRAMES), count):
        yield task.prompt.format(input=message), completion(task, explain(case), _label(case))


def _label(case: Case) -> str:
    return decide(case.reason, case.days, case.receipt)


def _teacher_batches(
    task: Task, tokenizer: PreTrainedTokenizerFast, sequences: int = 8, shots: int = 6
) -> Iterator[Batch]:
    """Sequences of the instruction and `shots` random examples; labels only on the completions and on the
    opening of the next example, so that a teacher stops where the prompt's form stops."""
    documents = _documents(task, "returns-desk/teacher", 10**9)
    head = tokenizer(task.instruction.strip() + "\n\n")["input_ids"]
    opening = tokenizer("\n\n" + task.prompt.split("{input}")[0].rstrip(), add_special_tokens=False)["input_ids"]
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        for _ in range(sequences):
            ids, labels = list(head), [IGNORED] * len(head)
            for number, (prompt, answer) in enumerate(itertools.islice(documents, shots)):
                asked = tokenizer(("\n\n" if number else "") + prompt, add_special_tokens=False)["input_ids"]
                said = tokenizer(answer, add_special_tokens=False)["input_ids"]
                learned = len(opening) if number and asked[: len(opening)] == opening else 0
                ids += asked + said
                labels += asked[:learned] + [IGNORED] * (len(asked) - learned) + said
            rows.append((ids, labels))
        yield {
            "input_ids": _pad([ids for ids, _ in rows], tokenizer.pad_token_id),
            "labels": _pad([labels for _, labels in rows], IGNORED),
        }


@torch.no_grad()
def teacher_accuracy(
    task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, count: int
) -> float:
    """Share of labels right, by the task file's own prompt, greedy."""
    model.eval()
    rows = split(name)[:count]
    right = 0
    for at in range(0, len(rows), 50):
        part = rows[at : at + 50]
        tokenizer.padding_side = "left"
        prompts = tokenizer([completion_prompt(task, r["message"]) for r in part], return_tensors="pt", padding=True)
        out = model.generate(**prompts, max_new_tokens=96, do_sample=False)
        texts = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(read_reply(task, t).label == r["decision"] for t, r in zip(texts, part, strict=True))
    model.train()
    return right / len(rows)


# ---------------------------------------------------------------- the student base


def train_student(task: Task, out: Path, steps: int) -> None:
    """Denoising of unlabelled messages: spans of random length and density, and whole texts."""
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    messages = (message for message, _ in itertools.islice(stream("returns-desk/student-tokenizer"), 5000))
    tokenizer = make_tokenizer(
        itertools.chain([task.instruction] * 50, messages),
        vocab_size=1024 + SENTINELS,
        special=["<pad>", "</s>", "<unk>", *sentinels],
        template="$A </s>",
    )
    tokenizer.model_max_length = 512
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=160,
            d_kv=32,
            d_ff=448,
            num_heads=5,
            num_layers=4,
            num_decoder_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.1,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    for _ in _optimise(model, _denoising_batches(tokenizer), steps, lr=2e-3, every=500):
        save(model, tokenizer, out)
    save(model, tokenizer, out)


def _denoising_batches(tokenizer: PreTrainedTokenizerFast, size: int = 64) -> Iterator[Batch]:
    rng = random.Random(SEED)
    messages = (message for message, _ in stream("returns-desk/student"))
    while True:
        pairs = []
        for ids in tokenizer(list(itertools.islice(messages, size)), add_special_tokens=False)["input_ids"]:
            pairs.append((ids, ids) if rng.random() < 0.3 else corrupt_spans(ids, rng, tokenizer))
        end = [tokenizer.eos_token_id]
        inputs = _pad([source + end for source, _ in pairs], tokenizer.pad_token_id)
        yield {
            "input_ids": inputs,
            "attention_mask": (inputs != tokenizer.pad_token_id).long(),
            "labels": _pad([target + end for _, target in pairs], IGNORED),
        }


def corrupt_spans(
    ids: list[int], rng: random.Random, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[int]]:
    """T5's span corruption: (input with a sentinel for each span, target of sentinels and spans)."""
    density, mean_length = rng.uniform(0.1, 0.4), rng.choice([2, 3, 6])
    spans = max(1, min(SENTINELS - 1, round(len(ids) * density / mean_length)))
    starts = sorted(rng.sample(range(len(ids)), min(spans, len(ids))))
    source: list[int] = []
    target: list[int] = []
    at = 0
    for number, start in enumerate(s for s in starts):
        if start < at:
            continue  # inside the span before it
        length = min(1 + int(rng.expovariate(1 / mean_length)), len(ids) - start)
        sentinel = tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>")
        source += [*ids[at:start], sentinel]
        target += [sentinel, *ids[start : start + length]]
        at = start + length
    return source + ids[at:], target


# ---------------------------------------------------------------- what both share


def make_tokenizer(texts: Iterator[str], vocab_size: int, special: list[str], template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with digits apart; any text can be written with it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    marks = [t for t in ("<s>", "</s>") if t in template]
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, core.token_to_id(t)) for t in marks]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>" if "<s>" in special else None,
        unk_token="<unk>" if "<unk>" in special else None,
    )


def _optimise(model: PreTrainedModel, batches: Iterator[Batch], steps: int, lr: float, every: int) -> Iterator[int]:
    """Adam with warm-up and cosine decay, bf16 products; yields every `every` steps."""
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    losses: list[float] = []
    start = time.time()
    for step in range(1, steps + 1):
        scale = min(step / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Any = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % (every // 4) == 0:
            recent = losses[-(every // 4) :]
            print(f"step {step}: loss {sum(recent) / len(recent):.4f}, {time.time() - start:.0f} s", flush=True)
        if step % every == 0 and step < steps:
            yield step


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A plain Hugging Face directory, weights in bf16."""
    tokenizer.padding_side = "right"
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.to(torch.float32)


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


if __name__ == "__main__":
    main()
