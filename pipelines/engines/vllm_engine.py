"""vLLM in this process: one engine that several threads feed, so that it never runs dry between batches.

`vllm.LLM.generate` drains the engine at the end of every call. Here a thread of its own steps the engine
for as long as anything is under way, and callers wait for their own rows only.
"""

import itertools
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from pipelines.engines import Completion, EngineDied, Request
from pipelines.errors import UserError
from pipelines.recipe import Teacher, resolve

_Item = tuple[str, Any, Any, "Future[Any]"]  # the request's name, prompt, sampling parameters, and who waits


class VllmEngine:
    """See `pipelines.engines.Engine`. Started at the first call."""

    def __init__(self, teacher: Teacher, stop: Sequence[str]) -> None:
        self.teacher, self.stop = teacher, list(stop)
        self.ready_at = 0.0  # when it was started, by the clock
        self._engine: Any = None
        self._starting = threading.Lock()
        self._dead: BaseException | None = None
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._numbers = itertools.count()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        from vllm import TokensPrompt

        self._start()
        made: list[Completion | Future[Any]] = []
        limit = self._engine.model_config.max_model_len
        for request, ids in zip(requests, self._encode(requests), strict=True):
            if len(ids) >= limit:
                tokens = f"{len(ids):,} tokens, and the model's context holds {limit:,}"
                made.append(Completion("", "too_long", f"the prompt has {tokens}", input_tokens=len(ids)))
                continue
            future: Future[Any] = Future()
            prompt = TokensPrompt(prompt_token_ids=ids)
            self._inbox.put((str(next(self._numbers)), prompt, self._sampling(request), future))
            made.append(future)
        if self._dead is not None:
            raise EngineDied(str(self._dead))
        return [one if isinstance(one, Completion) else _completion(one) for one in made]

    def close(self) -> None:
        self._inbox.put(None)
        if self._engine is not None and self._dead is None:
            self._engine.engine_core.shutdown()

    def _start(self) -> None:
        with self._starting:
            if self._engine is None:
                self._engine = start_vllm(self.teacher)
                self._tokenizer = self._engine.get_tokenizer()
                self.ready_at = time.time()
                threading.Thread(target=self._live, daemon=True).start()

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Token ids of prompts; special tokens as the tokenizer adds them, or as the chat template does."""
        if isinstance(requests[0].prompt, str):
            return list(self._tokenizer([r.prompt for r in requests])["input_ids"])
        if not self._tokenizer.chat_template:
            raise UserError(
                f"teacher.model {self.teacher.model!r} has no chat template; set teacher.prompt to completion"
            )
        texts = [
            self._tokenizer.apply_chat_template(
                list(request.prompt), tokenize=False, add_generation_prompt=True, **self.teacher.chat_template_args
            )
            for request in requests
        ]
        return list(self._tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _sampling(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        return SamplingParams(
            temperature=self.teacher.temperature,
            top_p=self.teacher.top_p,
            max_tokens=self.teacher.max_tokens,
            stop=self.stop,
            seed=request.seed,
            structured_outputs=StructuredOutputsParams(structural_tag=request.structure) if request.structure else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _live(self) -> None:
        """Add what comes, and step while anything is under way."""
        waiting: dict[str, Future[Any]] = {}
        try:
            while self._take(waiting):
                for output in self._engine.step():
                    if output.finished:
                        waiting.pop(output.request_id).set_result(output)
        except BaseException as error:  # whatever the engine died of, its callers must hear of it
            self._dead = error
            self._fail(waiting, error)

    def _take(self, waiting: "dict[str, Future[Any]]") -> bool:
        """Hand what has come to the engine; wait for something when nothing is under way. False: closed."""
        while True:
            try:
                item = self._inbox.get(block=not waiting)
            except queue.Empty:
                return True
            if item is None:
                return False
            name, prompt, sampling, future = item
            try:
                self._engine.add_request(name, prompt, sampling)
            except ValueError as error:  # this request is refused; the engine lives
                future.set_exception(error)
            else:
                waiting[name] = future

    def _fail(self, waiting: "dict[str, Future[Any]]", error: BaseException) -> None:
        while not self._inbox.empty():
            if (item := self._inbox.get()) is not None:
                waiting[item[0]] = item[3]
        for future in waiting.values():
            future.set_exception(EngineDied(str(error)))


def _completion(future: "Future[Any]") -> Completion:
    """What became of one request.

    Raises:
        EngineDied: it was under way when the engine died.
    """
    try:
        output = future.result()
    except ValueError as error:
        return Completion("", "error", " ".join(str(error).split()))
    written = output.outputs[0]
    return Completion(
        written.text,
        "length" if written.finish_reason == "length" else "stop",
        input_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens,
        output_tokens=len(written.token_ids),
    )


def engine_arguments(teacher: Teacher) -> dict[str, Any]:
    """The recipe's teacher as vLLM's engine arguments."""
    arguments: dict[str, Any] = {
        "model": resolve(teacher.model),
        "revision": teacher.revision,
        "dtype": teacher.dtype,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if teacher.gpus:
        arguments["tensor_parallel_size"] = teacher.gpus // teacher.pipeline_parallel
        arguments["pipeline_parallel_size"] = teacher.pipeline_parallel
        if teacher.gpus > 1:
            arguments["distributed_executor_backend"] = "mp"
    else:
        # otherwise vLLM takes most of the machine's memory
        arguments["kv_cache_memory_bytes"] = int(teacher.kv_cache_gb * 2**30)
    return arguments | teacher.engine_args


def start_vllm(teacher: Teacher) -> Any:
    """A running engine.

    Raises:
        UserError: it does not start.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or all replicas of a machine share the same cores
    # The engine lives in this process: it starts sooner, leaves no orphan when it is killed, and a death is seen,
    # while vLLM's client of an engine in another process waits for ever when that one is killed.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import EngineArgs, LLMEngine

    try:
        return LLMEngine.from_engine_args(EngineArgs(**engine_arguments(teacher)))
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"teacher.model {teacher.model!r}: vLLM does not start: {reason}"
            " (DISTILL_WORKER_LOGS=1 shows all that it says)"
        ) from error
