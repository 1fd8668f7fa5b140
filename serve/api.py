"""The HTTP side: routes, limits, keys, errors, the access log. What answers is given to `make_api`; no Ray here but
for the counters.

Every error is JSON, `{"error": one sentence, "request_id": …}`. Nothing that a user sent is logged or sent back.
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.predictor import Prediction
from pipelines.tasks import Task
from serve.keys import Keys
from serve.meter import Meter
from serve.settings import Limits

PLAYGROUND = Path(__file__).with_name("playground.html")
_GUARDED = "/v1/"
_PREDICT = "/v1/predict"
_FULL = 503
RETRY_AFTER_S = 1
_LONGEST_ID = 128
_FACTS = "distill"  # what a handler tells the access log, within the request's scope
_EXAMPLES = 5

Value = str | int | float | bool | list[str] | None


class PredictRequest(BaseModel):
    """Inputs to label."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: list[str | dict[str, Value]] = Field(
        min_length=1, description="as the student reads them, or objects with the fields of the task"
    )
    scores: bool = Field(default=False, description="the probability of every label too, of closed sets")
    model: str | None = Field(default=None, description="`name`, or `name@version`; by default the default model")


class PredictionBody(BaseModel):
    """One answer. `label` is null where the student wrote no valid one; `text` then says what it wrote. Of an answer
    whose source is the teacher no confidence is known."""

    label: str | None
    confidence: float | None
    abstained: bool
    source: Literal["student", "teacher"] = "student"
    text: str | None = None
    scores: dict[str, float] | None = None


class PredictResponse(BaseModel):
    """Answers in the order of the inputs."""

    model: str
    version: str
    predictions: list[PredictionBody]
    milliseconds: float


class ErrorResponse(BaseModel):
    error: str
    request_id: str


class Student(Protocol):
    """A bundle that can be asked."""

    name: str
    version: str
    task: Task

    async def answer(
        self, texts: Sequence[str], choices: Sequence[Sequence[str] | None], scores: bool
    ) -> list[Prediction]:
        """Predictions of rendered inputs, in their order."""
        ...


class Students(Protocol):
    """The bundles of a replica."""

    def pick(self, model: str | None) -> Student:
        """The one to answer a request. Raises KeyError: there is none of that name."""
        ...

    async def escalate(
        self, student: Student, texts: list[str], choices: list[list[str] | None], made: list[Prediction]
    ) -> dict[int, str]:
        """The teacher's labels of inputs that the student abstains on, by their place; none where it is not asked."""
        ...

    def shadow(
        self, student: Student, texts: list[str], choices: list[list[str] | None], made: list[Prediction]
    ) -> None:
        """Have a shadow of the student answer too, where there is one, and count how often it agrees."""
        ...

    def listed(self) -> list[tuple[Student, float]]:
        """All, with their share of their name's requests; the default model's come first."""
        ...


def make_api(students: Students, limits: Limits, keys: Keys | None, meter: Meter, access_log: bool = True) -> FastAPI:
    """The application. With `keys` None, none is asked for."""
    api = FastAPI(title="stepdistill", description="Labels from distilled students.", redoc_url=None)
    api.add_middleware(_Gate, limits=limits, keys=keys, meter=meter, log=_access_log() if access_log else None)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(StarletteHTTPException, _refused)
    page = PLAYGROUND.read_text(encoding="utf-8")
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 422, 503)
    }
    guarded = [Security(HTTPBearer(auto_error=False))] if keys is not None else []

    @api.post(_PREDICT, response_model=PredictResponse, responses=errors, dependencies=guarded)
    async def predict(body: PredictRequest, request: Request) -> Response:
        """Label one input or many."""
        start = time.perf_counter()
        if len(body.inputs) > limits.inputs:
            raise HTTPException(422, f"inputs: {len(body.inputs):,} of them, and a request takes {limits.inputs:,}")
        try:
            student = students.pick(body.model)
        except KeyError as error:
            raise HTTPException(
                404, "model: there is none of that name and version; GET /v1/models lists them"
            ) from error
        task = student.task
        rows = [_render(task, number, given, limits) for number, given in enumerate(body.inputs)]
        texts, choices = [text for text, _ in rows], [own for _, own in rows]
        made = await student.answer(texts, choices, body.scores)
        students.shadow(student, texts, choices, made)
        escalated = await students.escalate(student, texts, choices, made)
        request.scope[_FACTS].update(model=student.name, version=student.version, inputs=len(made))
        return JSONResponse(
            {
                "model": student.name,
                "version": student.version,
                "predictions": [
                    _shown(prediction, body.scores, escalated.get(place)) for place, prediction in enumerate(made)
                ],
                "milliseconds": round(1000 * (time.perf_counter() - start), 2),
            }
        )

    @api.get("/v1/models", dependencies=guarded)
    async def models() -> list[dict[str, Any]]:
        """The models, the default one first: labels, fields, and examples to try."""
        return [
            {
                "name": student.name,
                "version": student.version,
                "share": share,
                "task": student.task.name,
                "description": student.task.description,
                "kind": student.task.answer.kind,
                "labels": student.task.answer.labels,
                "fields": student.task.fields,
                "examples": [exemplar.input for exemplar in student.task.exemplars[:_EXAMPLES]],
            }
            for student, share in students.listed()
        ]

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """The models are loaded; a replica takes no requests before."""
        return {"status": "ready", "models": [f"{s.name}@{s.version}" for s, _ in students.listed()]}

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> str:
        return page

    return api


def _render(task: Task, number: int, given: str | dict[str, Value], limits: Limits) -> tuple[str, list[str] | None]:
    """An input as the student reads it, and the row's own choices.

    Raises:
        HTTPException: 422, with the input's number and what is wrong with it.
    """
    where = f"inputs[{number}]"
    if isinstance(given, str):
        if task.answer.kind == "row_choice":
            raise HTTPException(422, f"{where}: give an object with {', '.join(task.fields)}; the answers are its own")
        text, choices = given, None
    else:
        lacking = [field for field in task.fields if given.get(field) is None]
        if lacking:
            raise HTTPException(
                422, f"{where}: lacks {', '.join(lacking)}; the task's fields are {', '.join(task.fields)}"
            )
        try:
            choices = task.row_choices(given)
        except ValueError as error:
            raise HTTPException(422, f"{where}: {task.answer.choices} must be a list of 2 to 26 strings") from error
        text = task.render(given)
    try:
        "".join([text, *(choices or ())]).encode()
    except UnicodeEncodeError as error:
        raise HTTPException(422, f"{where}: half of a surrogate pair in it, so it is no Unicode text") from error
    longest = max(len(text), *map(len, choices or [""]))
    if longest > limits.characters:
        raise HTTPException(422, f"{where}: {longest:,} characters, and an input takes {limits.characters:,}")
    return text, choices


def _shown(prediction: Prediction, scores: bool, escalated: str | None) -> dict[str, Any]:
    if escalated is not None:
        return {"label": escalated, "confidence": None, "abstained": False, "source": "teacher"}
    shown: dict[str, Any] = {
        "label": prediction.label,
        "confidence": round(prediction.confidence, 6),
        "abstained": prediction.abstained,
        "source": "student",
    }
    if prediction.label is None:
        shown["text"] = prediction.text
    if scores and prediction.scores is not None:
        shown["scores"] = {label: round(score, 6) for label, score in prediction.scores.items()}
    return shown


# errors


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _error(request.scope, error.status_code, str(error.detail), error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, without the body's own words."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return _error(request.scope, 400, "the body is no JSON")
    places = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:] if _known(part)]
    where = "".join(places).lstrip(".") or "body"
    extra = f" (1 of {len(problems)} problems)" if len(problems) > 1 else ""
    return _error(request.scope, 422, f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{extra}")


def _known(part: str | int) -> bool:
    return isinstance(part, int) or part in PredictRequest.model_fields


def _error(scope: Scope, status: int, sentence: str, headers: Any = None) -> JSONResponse:
    facts = scope.get(_FACTS, {})
    facts["error"] = sentence
    return JSONResponse({"error": sentence, "request_id": facts.get("request_id", "")}, status, headers)


# what every request passes


class _Gate:
    """Keys, how many requests and how large, what happens to a bug; one line of log and one count for each request."""

    def __init__(
        self, app: ASGIApp, limits: Limits, keys: Keys | None, meter: Meter, log: logging.Logger | None
    ) -> None:
        self.app, self.limits, self.keys, self.meter, self.log = app, limits, keys, meter, log
        self.held = 0  # requests for predictions that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, size = time.perf_counter(), 0, 0
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:_LONGEST_ID]  # Serve's proxy gives one
        facts: dict[str, Any] = {"request_id": request_id}
        scope[_FACTS] = facts

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limits.body_bytes:
                raise self._too_large()
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        takes_room = scope["path"] == _PREDICT
        self.held += takes_room
        try:
            refused = self._refuse(scope, headers, facts)
            await (refused or self.app)(scope, counted, noted)
        except Exception as error:
            facts["error"] = _place(error)
            if not status:
                failed = {"error": "it failed, and that is a fault of the server", "request_id": request_id}
                await JSONResponse(failed, 500)(scope, receive, noted)
        finally:
            self.held -= takes_room
            path = self._path(scope)
            self.meter.request(path, status)
            if 400 <= status < 500 or status == _FULL:
                self.meter.rejected(str(status))
            if self.log is not None:
                line = {
                    "time": round(time.time(), 3),
                    **facts,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "bytes": size,
                    "milliseconds": round(1000 * (time.perf_counter() - start), 2),
                }
                self.log.info(json.dumps(line))

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes], facts: dict[str, Any]) -> Response | None:
        """What is answered before a body is read, or None."""
        if self.keys is not None and scope["path"].startswith(_GUARDED):
            given = headers.get(b"authorization", b"").decode("latin-1")
            scheme, _, key = given.partition(" ")
            known = self.keys.find(key.strip()) if scheme.lower() == "bearer" else None
            if known is None:
                sentence = "a valid API key is wanted: Authorization: Bearer KEY"
                return _error(scope, 401, sentence, {"WWW-Authenticate": "Bearer"})
            facts["key"] = known
        if scope["path"] == _PREDICT and self.held > self.limits.requests:
            sentence = f"{self.limits.requests:,} requests are under way, and no more wait; try again"
            return _error(scope, _FULL, sentence, {"Retry-After": str(RETRY_AFTER_S)})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            error = self._too_large()
            return _error(scope, error.status_code, error.detail)
        return None

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is too large; a request takes {self.limits.body_bytes:,} bytes")

    @staticmethod
    def _path(scope: Scope) -> str:
        """The route, so that paths that are not there make no series and no log of their own."""
        route = scope.get("route")
        return str(getattr(route, "path", "other"))


def _place(error: Exception) -> str:
    """What kind of error it is and where; its message may hold what a user sent."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} at " + " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(frames))


def _access_log() -> logging.Logger:
    """One JSON object a line on stdout."""
    log = logging.getLogger("serve.access")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
