"""Asking the teacher, against an HTTP server on loopback."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines.predictor import Prediction
from pipelines.tasks import load_task
from serve.escalate import Teacher
from serve.meter import Meter
from serve.settings import Escalate

pytestmark = pytest.mark.slow

TASK = load_task("returns_desk")
SURE, UNSURE = Prediction("refund", 0.9, "refund"), Prediction("repair", 0.3, "repair", abstained=True)


class Server(ThreadingHTTPServer):
    """Says what `said` holds, after so long; keeps what it was asked."""

    said, status, pause = "It is faulty. So the answer is decline.", 200, 0.0

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        time.sleep(self.server.pause)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.server.said}}
        content = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def ask(server: Server, made: list[Prediction], **settings: Any) -> dict[int, str]:
    url = f"http://127.0.0.1:{server.server_port}/v1"

    async def answers() -> dict[int, str]:
        teacher = Teacher(Escalate(url=url, model="m", **settings), Meter())
        return await teacher.answers(TASK, [f"text {n}" for n in range(len(made))], [None] * len(made), made)

    return asyncio.run(answers())


def test_only_what_the_student_abstains_on_is_asked(server: Server) -> None:
    assert ask(server, [SURE, UNSURE, SURE]) == {1: "decline"}
    assert [body["messages"][-1]["content"] for body in server.asked] == ["text 1"]


def test_within_its_time_or_not_at_all(server: Server) -> None:
    server.pause = 2.0
    start = time.monotonic()
    assert ask(server, [UNSURE], timeout_s=0.3) == {}
    assert time.monotonic() - start < 1.5


def test_beyond_the_rate_the_students_answers_stand(server: Server) -> None:
    answered = ask(server, [UNSURE] * 20, requests_per_minute=180)
    assert len(answered) == len(server.asked) == 3


@pytest.mark.parametrize(("status", "said"), [(500, ""), (429, ""), (200, "no idea"), (200, "")])
def test_a_teacher_that_fails_or_cannot_be_read_changes_nothing(server: Server, status: int, said: str) -> None:
    server.status, server.said = status, said
    assert ask(server, [UNSURE]) == {}
    assert len(server.asked) == 1
