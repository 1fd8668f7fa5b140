"""What `serve.py` compares without a server: bundles with random weights, texts, and one function a side."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pipelines.bundle import Bundle
from pipelines.checksums import write_checksums
from pipelines.predictor import Predictor, can_run
from pipelines.prompts import completion_prompt, stop_strings
from pipelines.recipe import load_recipe, resolve
from pipelines.student import LABEL_PREFIX, load_student
from pipelines.tasks import Task, load_task

Side = Callable[[list[str]], object]
Times = dict[tuple[str, int], list[float]]

LABELS = ("jcahdebf", "gadecihb", "bafjedgi")  # of two to four tokens, as labels have in T5's own vocabulary
CLOSED = Task.model_validate({"name": "bench", "input": "{text}", "answer": {"kind": "choice", "labels": LABELS}})
OPEN = Task.model_validate({"name": "bench", "input": "{text}", "answer": {"kind": "expression"}})
OPEN_TOKENS = 16  # of every expression; `3 * (14 + 8) - 5` has about as many
_SYMBOLS = "0123456789+-*/()."
_SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "d_model": 512,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}


def make_bundle(folder: Path, shape: str, task: Task = CLOSED) -> list[str]:
    """A bundle of the shape of T5 v1.1 small (77M parameters) or T5 base (223M) with random weights, or of the
    quickstart's student base; and texts for it."""
    folder.mkdir()
    if shape == "quickstart":
        task = load_task("returns_desk")
        model, tokenizer = load_student(resolve("builtin:quickstart/student"))
        lines = Path(resolve("builtin:quickstart/data"), "test.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [task.render(json.loads(line)) for line in lines]
    else:
        from transformers import T5Config

        texts = _tokenizer(folder)
        T5Config(
            vocab_size=32128,
            d_kv=64,
            **_SHAPES[shape],
            decoder_start_token_id=0,
            architectures=["T5ForConditionalGeneration"],
        ).save_pretrained(folder)
        model, tokenizer = load_student(str(folder), init="random")
    if task is OPEN:
        _write_symbols_alone(model, tokenizer)
    bundle = Bundle("bench", "1", precision="bf16" if can_run("bf16") else "int8")
    Predictor(model, tokenizer, task, 256, OPEN_TOKENS, bundle=bundle).save(folder)
    write_checksums(folder)
    return texts


def _tokenizer(folder: Path) -> list[str]:
    """A tokenizer of made-up words in the folder, and texts of 60 to 120 of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(3000)]
    texts = [" ".join(dice.choices(words, k=dice.randint(45, 95))) for _ in range(512)]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    made.train_from_iterator([*texts, LABEL_PREFIX, _SYMBOLS], trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return texts


def _write_symbols_alone(model: Any, tokenizer: Any) -> None:
    """Leave only the tokens of expressions likely, so that random weights write such, and never end."""
    wanted = tokenizer.convert_tokens_to_ids(list(_SYMBOLS))
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        kept = head[wanted].clone()
        head.zero_()
        head[wanted] = kept


def time_sides(sides: dict[str, Side], texts: list[str], sizes: Sequence[int], rounds: int) -> Times:
    """Milliseconds of a batch, by side and rows; the sides take turns."""
    times: Times = {}
    for turn in range(rounds + 1):
        for size in sizes:
            for name, predict in sides.items():
                for part in range(4 if size < 32 else 1):
                    at = (turn * 64 + part * size) % (len(texts) - size)
                    batch = texts[at : at + size]
                    start = time.perf_counter()
                    predict(batch)
                    if turn:  # in the first, memory is laid out and kernels are chosen
                        times.setdefault((name, size), []).append(1000 * (time.perf_counter() - start))
    return times


def closed_sides(folder: Path, threads: int, onnx_python: str | None) -> dict[str, Side]:
    """Labels, by each side."""
    sides = {"hf": _hugging_face(folder, _longest(folder)), "ours": Predictor.open(folder).predict}
    sides["ours fp32"] = Predictor.open(folder, precision="fp32").predict
    if find_spec("ctranslate2"):
        sides["ctranslate2"] = _ctranslate2(folder, threads)
    if onnx_python:
        sides["onnx"] = _onnx(folder, threads, onnx_python)
    return sides


def open_sides(folder: Path) -> dict[str, Side]:
    """Expressions of `OPEN_TOKENS` tokens, by each side; ours looks at every token whether one can go on like that."""
    return {
        "hf open": _hugging_face(folder, OPEN_TOKENS),
        "ours open": Predictor.open(folder).predict,
        "ours open fp32": Predictor.open(folder, precision="fp32").predict,
    }


def _longest(folder: Path) -> int:
    """Tokens of the longest label."""
    student = Predictor.open(folder)
    return max(map(len, student.tokenizer(list(student.task.answer.labels))["input_ids"]))


def _hugging_face(folder: Path, length: int) -> Side:
    model, tokenizer = load_student(str(folder))
    model.eval()

    def predict(texts: list[str]) -> object:
        inputs = tokenizer([LABEL_PREFIX + text for text in texts], padding=True, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=length,
                min_new_tokens=length,  # random weights would end anywhere
                do_sample=False,
            )
        return tokenizer.batch_decode(made, skip_special_tokens=True)

    return predict


def _ctranslate2(folder: Path, threads: int) -> Side:
    """CTranslate2 in int8, once its fp32 has been found to give labels the probabilities that the model gives them."""
    import ctranslate2

    class Converter(ctranslate2.converters.TransformersConverter):  # type: ignore[misc]
        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            # transformers 5 says so of every T5, and the converter would scale all outputs
            model.config.tie_word_embeddings = model.config.scale_decoder_outputs
            return model

    model, tokenizer = load_student(str(folder))
    longest = _longest(folder)
    converted = folder.with_name(folder.name + "-ct2")
    Converter(str(folder)).convert(str(converted), force=True)

    def translator(kind: str) -> Any:
        return ctranslate2.Translator(str(converted), device="cpu", compute_type=kind, intra_threads=threads)

    def tokens(texts: Sequence[str]) -> list[list[str]]:
        ids = tokenizer([LABEL_PREFIX + text for text in texts])["input_ids"]
        return [tokenizer.convert_ids_to_tokens(row) for row in ids]

    labels = tokenizer(list(LABELS))["input_ids"]
    read = tokenizer([LABEL_PREFIX + "a bed"], return_tensors="pt")
    written = [tokenizer.convert_ids_to_tokens(row[:-1]) for row in labels]
    scored = translator("float32").score_batch(tokens(["a bed"] * len(labels)), written)
    theirs = torch.tensor([sum(row.log_probs) for row in scored])
    with torch.inference_mode():
        losses = [len(row) * model.eval()(**read, labels=torch.tensor([row])).loss for row in labels]
    if (theirs + torch.stack(losses)).abs().max() > 1e-3:
        raise SystemExit("CTranslate2 gives labels other probabilities than the model that it was made of")
    fast = translator("int8")

    def predict(texts: list[str]) -> object:
        made = fast.translate_batch(
            tokens(texts), beam_size=1, max_decoding_length=longest, min_decoding_length=longest
        )
        return [tokenizer.convert_tokens_to_string(m.hypotheses[0]) for m in made]

    return predict


def _onnx(folder: Path, threads: int, python: str) -> Side:
    """ONNX Runtime in int8: greedy, with a cache. `python` can export; see `onnx_export.py`."""
    import numpy as np
    import onnxruntime

    to = folder.with_name(folder.name + "-onnx")
    to.mkdir()
    subprocess.run([python, Path(__file__).with_name("onnx_export.py"), folder, to], check=True, capture_output=True)
    student = Predictor.open(folder)
    tokenizer, longest = student.tokenizer, _longest(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(to / f"{name}.onnx", options, providers=["CPUExecutionProvider"])

    encoder, first, others = map(session, ("encoder_model", "decoder_model", "decoder_with_past_model"))
    first_names, other_names = ([output.name for output in some.get_outputs()] for some in (first, others))

    def predict(texts: list[str]) -> object:
        inputs = tokenizer([LABEL_PREFIX + text for text in texts], padding=True, return_tensors="np")
        mask = inputs["attention_mask"].astype(np.int64)
        read = {"input_ids": inputs["input_ids"].astype(np.int64), "attention_mask": mask}
        given: dict[str, Any] = {"encoder_attention_mask": mask, "encoder_hidden_states": encoder.run(None, read)[0]}
        tokens, written = np.zeros((len(texts), 1), np.int64), []
        for step in range(longest):
            some, names = (others, other_names) if step else (first, first_names)
            made = dict(zip(names, some.run(None, given | {"input_ids": tokens}), strict=True))
            tokens = made["logits"][:, -1].argmax(axis=-1, keepdims=True)
            written.append(tokens)
            given.pop("encoder_hidden_states", None)
            given |= {name.replace("present", "past_key_values"): made[name] for name in names if name != "logits"}
        return tokenizer.batch_decode(np.concatenate(written, axis=1), skip_special_tokens=True)

    return predict


def teacher_rate(rows: int) -> float:
    """Rows a second that the quickstart's teacher writes by vLLM alone, on all cores; in a process of its own."""
    command = [sys.executable, "-c", f"from benchmarks.serve_models import _teach; _teach({rows})"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": root}
    environment["OMP_NUM_THREADS"] = str(os.cpu_count())
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    rates = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("RATE ")]
    if not rates:
        raise SystemExit(f"the teacher failed:\n{done.stderr[-4000:]}")
    return float(rates[0])


def _teach(rows: int) -> None:
    from vllm import LLM, SamplingParams

    from pipelines.engines.vllm_engine import engine_arguments

    recipe = load_recipe("quickstart")
    task = load_task(recipe.task)
    lines = Path(resolve("builtin:quickstart/data"), "test.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [completion_prompt(task, task.render(json.loads(line))) for line in lines[:rows]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = LLM(**engine_arguments(recipe.teacher))
    start = time.perf_counter()
    sampling = SamplingParams(
        temperature=0, max_tokens=recipe.teacher.max_tokens, stop=stop_strings(task, "completion")
    )
    made = llm.generate(prompts, sampling, use_tqdm=False)
    print(f"RATE {len(made) / (time.perf_counter() - start)}")
