"""How fast labels are served: the predictor against the usual way, and the whole HTTP path against plain FastAPI.

Weights are random, of the shape of T5 v1.1 small: times mean something, answers don't. All sides get the same texts of
60 to 120 tokens and three labels, and take turns.

    hf        Hugging Face `generate`, greedy, fp32, as many new tokens as the longest label has
    int8      the same with CTranslate2 in int8, where that is installed; it is no dependency of ours
    ours      the predictor: the labels scored, in bf16 where the processor has it, otherwise in int8
    ours fp32

    plain     FastAPI and uvicorn around the same predictor, with a batcher of a few lines
    proxied   our application behind Ray Serve's proxy
    direct    the same, as `distill serve` runs one replica: the replica listens itself
    noop      each of them without a model
"""

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # there, `serve` would be this file

import aiohttp  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from pipelines.checksums import write_checksums  # noqa: E402
from pipelines.predictor import Bundle, Prediction, Predictor, can_run  # noqa: E402
from pipelines.student import LABEL_PREFIX, load_student  # noqa: E402
from pipelines.tasks import Task  # noqa: E402

MUST = {
    "hf_b1": 4.0,
    "hf_b8": 4.0,
    "hf_b32": 4.5,
    "int8_b1": 0.95,
    "int8_b8": 0.95,
    "int8_b32": 0.95,
    "http_c16": 0.90,
    "http_c64": 0.85,
    "http_noop_c64": 0.6,
}
SIZES = (1, 8, 32)
CONNECTIONS = (1, 16, 64)
LABELS = ("jcahdebf", "gadecihb", "bafjedgi")  # of two to four tokens, as labels have in T5's own vocabulary
TASK = Task.model_validate({"name": "bench", "input": "{text}", "answer": {"kind": "choice", "labels": LABELS}})
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Side = Callable[[list[str]], object]


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of one turn over HTTP.")] = 4.0,
    threads: Annotated[int, typer.Option(min=1, help="Of the model.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="One turn of each.")] = False,
) -> None:
    """Run all sides in turn; print two tables, then one JSON object."""
    if context.invoked_subcommand:
        return
    rounds, seconds = (1, 2.0) if quick else (rounds, seconds)
    console = Console()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        texts = _make_bundle(Path(folder))
        times = _time_predictors(Path(folder), texts, rounds, threads)
        speeds = _time_servers(Path(folder), texts, rounds, seconds, threads)
    medians = {key: statistics.median(values) for key, values in times.items()}
    rates = {key: statistics.median(values) for key, values in speeds.items()}
    _show(console, "ms a batch", SIZES, medians)
    _show(console, "requests/s at connections", CONNECTIONS, rates)
    ratios = {f"hf_b{n}": medians["hf", n] / medians["ours", n] for n in SIZES}
    if ("int8", 1) in medians:
        ratios |= {f"int8_b{n}": medians["int8", n] / medians["ours", n] for n in SIZES}
    for side in ("direct", "proxied"):
        suffix = "" if side == "direct" else "_proxied"
        ratios |= {f"http_c{n}{suffix}": rates[side, n] / rates["plain", n] for n in (16, 64)}
        ratios[f"http_noop_c64{suffix}"] = rates[f"{side} noop", 64] / rates["plain noop", 64]
    ratios["http_c64_of_predictor"] = rates["direct", 64] / (32_000 / medians["ours", 32])
    shown = {name: round(value, 3) for name, value in ratios.items()}
    missing = sorted(MUST.keys() - ratios.keys())
    met = not missing and all(ratios[name] >= least for name, least in MUST.items())
    result = {"benchmark": "serve", "ratios": shown, "must": MUST, "met": met, "not_measured": missing}
    print(json.dumps({**result, "threads": threads, "bf16": can_run("bf16")}))


def _show(console: Console, title: str, columns: Sequence[int], values: dict[tuple[str, int], float]) -> None:
    table = Table(title=title)
    for name in ("", *map(str, columns)):
        table.add_column(name, justify="right" if name else "left")
    for side in dict.fromkeys(side for side, _ in values):
        table.add_row(side, *(f"{values[side, n]:.1f}" if (side, n) in values else "" for n in columns))
    console.print(table)


# the model and its texts


def _make_bundle(folder: Path) -> list[str]:
    """A bundle of T5 v1.1 small's shape in the folder, and texts for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config

    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(3000)]
    texts = [" ".join(dice.choices(words, k=dice.randint(45, 95))) for _ in range(512)]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    made.train_from_iterator([*texts, LABEL_PREFIX], trainer)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        architectures=["T5ForConditionalGeneration"],
    ).save_pretrained(folder)
    model, tokenizer = load_student(str(folder), init="random")
    bundle = Bundle("bench", "1", precision="bf16" if can_run("bf16") else "int8")
    Predictor(model, tokenizer, TASK, 256, 16, bundle=bundle).save(folder)
    write_checksums(folder)
    return texts


# the predictor


def _time_predictors(folder: Path, texts: list[str], rounds: int, threads: int) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of a batch, by side and rows."""
    sides: dict[str, Side] = {"hf": _hugging_face(folder), "ours": Predictor.open(folder).predict}
    sides["ours fp32"] = Predictor(*load_student(str(folder)), TASK, 256, 16).predict
    if find_spec("ctranslate2"):
        sides["int8"] = _ctranslate2(folder, threads)
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for size in SIZES:
            for name, predict in sides.items():
                for part in range(4 if size < 32 else 1):
                    at = (turn * 64 + part * size) % (len(texts) - size)
                    batch = texts[at : at + size]
                    start = time.perf_counter()
                    predict(batch)
                    if turn:  # in the first, memory is laid out and kernels are chosen
                        times.setdefault((name, size), []).append(1000 * (time.perf_counter() - start))
    return times


def _hugging_face(folder: Path) -> Side:
    model, tokenizer = load_student(str(folder))
    model.eval()
    longest = max(map(len, tokenizer(list(LABELS))["input_ids"]))

    def predict(texts: list[str]) -> object:
        inputs = tokenizer([LABEL_PREFIX + text for text in texts], padding=True, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=longest,
                min_new_tokens=longest,  # random weights would end anywhere
                do_sample=False,
            )
        return tokenizer.batch_decode(made, skip_special_tokens=True)

    return predict


def _ctranslate2(folder: Path, threads: int) -> Side:
    import ctranslate2

    _, tokenizer = load_student(str(folder))
    longest = max(map(len, tokenizer(list(LABELS))["input_ids"]))
    converted = folder.with_name(folder.name + "-ct2")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), quantization="int8", force=True)
    translator = ctranslate2.Translator(str(converted), device="cpu", compute_type="int8", intra_threads=threads)

    def predict(texts: list[str]) -> object:
        ids = tokenizer([LABEL_PREFIX + text for text in texts])["input_ids"]
        tokens = [tokenizer.convert_ids_to_tokens(row) for row in ids]
        made = translator.translate_batch(tokens, beam_size=1, max_decoding_length=longest, min_decoding_length=longest)
        return [tokenizer.convert_tokens_to_string(m.hypotheses[0]) for m in made]

    return predict


# the servers


def _time_servers(
    folder: Path, texts: list[str], rounds: int, seconds: float, threads: int
) -> dict[tuple[str, int], list[float]]:
    """Requests a second, by side and connections. The servers are up together; one at a time is asked."""
    rates: dict[tuple[str, int], list[float]] = {}
    for suffix in ("", " noop"):
        kinds = ("plain", "proxied", "direct")
        with ExitStack() as stack:
            urls = {kind: stack.enter_context(_server(kind + suffix, folder, threads)) for kind in kinds}
            for turn in range(rounds + 1):
                for connections in CONNECTIONS if not suffix else (64,):
                    for kind, url in urls.items():
                        rate = asyncio.run(_load(url, texts, connections, seconds if turn else 1.0))
                        if turn:
                            rates.setdefault((kind + suffix, connections), []).append(rate)
    return rates


async def _load(url: str, texts: list[str], connections: int, seconds: float) -> float:
    """Answers a second to so many connections, each of which asks for one input as soon as it has its last answer."""
    bodies = [json.dumps({"inputs": [text]}) for text in texts]
    done, end = 0, time.perf_counter() + seconds
    connector = aiohttp.TCPConnector(limit=connections)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def ask(number: int) -> None:
            nonlocal done
            while time.perf_counter() < end:
                async with session.post(f"{url}/v1/predict", data=bodies[number % len(bodies)]) as response:
                    content = await response.read()
                    if response.status != 200:
                        raise SystemExit(f"{url}: {response.status} {content[:200]!r}")
                    done += time.perf_counter() < end
                number += connections

        await asyncio.gather(*map(ask, range(connections)))
    return done / seconds


@contextmanager
def _server(kind: str, folder: Path, threads: int) -> Iterator[str]:
    """A server of its own process, until it is no longer wanted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "server", kind, str(folder), str(port), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_until_ready(url, process))
        yield url
    finally:
        process.terminate()
        process.wait(120)


async def _until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server of {url} ended with {process.returncode}")
            try:
                async with session.get(f"{url}/healthz") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)


@app.command(hidden=True)
def server(kind: str, folder: str, port: int, threads: int) -> None:
    """One server; `kind` is a side, perhaps with ` noop`."""
    side, _, noop = kind.partition(" ")
    if side == "plain":
        _serve_plain(None if noop else folder, port, threads)
        return
    from serve.run import hold, serve_here, settings_for

    if not noop:
        serve_here(settings_for([folder], "127.0.0.1", cpus=threads), "127.0.0.1", port, direct=side == "direct")
        return
    with hold("127.0.0.1", port, direct=side == "direct") as run:
        run(_noop_application())


def _noop_application() -> Any:
    """Our application, but that nothing is asked of a model."""
    from ray import serve

    from serve.api import Student, make_api
    from serve.meter import Meter
    from serve.settings import Limits

    class Nobody:
        name, version, task = "bench", "1", TASK

        async def answer(self, texts: Sequence[str], choices: object, scores: bool) -> list[Prediction]:
            return [Prediction(LABELS[0], 1.0, LABELS[0])] * len(texts)

    class Noop:
        def __serve_build_asgi_app__(self) -> Any:
            return make_api(self, Limits(), None, Meter())

        def pick(self, model: str | None) -> Student:
            return Nobody()

        async def escalate(self, *_: object) -> dict[int, str]:
            return {}

        def shadow(self, *_: object) -> None:
            pass

        def listed(self) -> list[tuple[Student, float]]:
            return [(Nobody(), 1.0)]

    return serve.deployment(serve.ingress()(Noop), max_ongoing_requests=128, max_queued_requests=256).bind()


def _serve_plain(folder: str | None, port: int, threads: int) -> None:
    """FastAPI and uvicorn as one would write them by hand: what waits is answered together, in a thread."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Body(BaseModel):
        inputs: list[str]

    torch.set_num_threads(threads)
    predictor = Predictor.open(folder) if folder else None
    api, worker = FastAPI(), ThreadPoolExecutor(1)
    waiting: asyncio.Queue[tuple[list[str], asyncio.Future[list[Prediction]]]] = asyncio.Queue()
    running: list[asyncio.Task[None]] = []

    async def batches(predictor: Predictor) -> None:
        while True:
            taken = [await waiting.get()]
            while not waiting.empty() and len(taken) < 32:
                taken.append(waiting.get_nowait())
            texts = [text for inputs, _ in taken for text in inputs]
            made = iter(await asyncio.get_running_loop().run_in_executor(worker, predictor.predict, texts))
            for inputs, future in taken:
                future.set_result([next(made) for _ in inputs])

    @api.post("/v1/predict")
    async def predict(body: Body) -> dict[str, Any]:
        if predictor is None:
            made = [Prediction(LABELS[0], 1.0, LABELS[0])] * len(body.inputs)
        else:
            if not running:
                running.append(asyncio.create_task(batches(predictor)))
            future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
            waiting.put_nowait((body.inputs, future))
            made = await future
        return {"predictions": [{"label": p.label, "confidence": p.confidence} for p in made]}

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    app()
