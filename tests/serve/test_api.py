"""The HTTP side around a real predictor, without Ray Serve: every refusal is 4xx with a reason in JSON."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api import Students, make_api
from serve.keys import Keys
from serve.meter import Meter
from serve.settings import Limits

pytestmark = pytest.mark.slow  # it loads transformers

LIMITS = Limits(requests=2, body_bytes=5000, inputs=4, characters=1000)
KEY = "correct horse"


def client_of(students: Students, keys: Keys | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_api(students, LIMITS, keys, Meter()), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-Request-ID": "r-1"})


@pytest.fixture(scope="module")
def api(students: Students) -> "Asked":
    return Asked(students)


class Asked:
    """Requests, one after another, each on a client of its own."""

    def __init__(self, students: Students, keys: Keys | None = None) -> None:
        self.students, self.keys = students, keys

    def __call__(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with client_of(self.students, self.keys) as client:
                return await client.request(method, path, **given)

        return asyncio.run(ask())


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert body["request_id"] == "r-1"
    return str(body["error"])


def test_answers_are_the_predictors(api: Asked, students: Students) -> None:
    texts = ["The lamp stopped working.", "Übergröße 🧾\x00", ""]
    made = api(
        "POST", "/v1/predict", json={"inputs": [*texts, {"message": texts[0], "decision": None}], "scores": True}
    )
    assert made.status_code == 200
    body = made.json()
    assert (body["model"], body["version"]) == ("returns", "1")
    expected = students.pick("returns").predictor.predict([*texts, texts[0]], scores=True)  # type: ignore[attr-defined]
    for shown, prediction in zip(body["predictions"], expected, strict=True):
        assert shown["label"] == prediction.label
        assert shown["confidence"] == pytest.approx(prediction.confidence, rel=1e-4)
        assert shown["scores"] == pytest.approx(prediction.scores, abs=1e-4)
        assert shown["abstained"] is prediction.abstained
    assert "scores" not in api("POST", "/v1/predict", json={"inputs": texts}).json()["predictions"][0]


def test_row_choices_come_with_their_row(api: Asked) -> None:
    row = {"question": "Where is a book kept?", "choices": ["library", "river"]}
    made = api("POST", "/v1/predict", json={"inputs": [row], "model": "quiz@1"}).json()
    assert made["predictions"][0]["label"] in row["choices"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"", 422, "body"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "body"),
        (b"[" * 4000, 400, "body"),
        (b"[]", 422, "body"),
        (b"{}", 422, "inputs"),
        (b'{"inputs": []}', 422, "inputs"),
        (b'{"inputs": "one"}', 422, "inputs"),
        (b'{"inputs": [1]}', 422, r"inputs[0]"),
        (b'{"inputs": [null]}', 422, r"inputs[0]"),
        (b'{"inputs": ["\\ud800"]}', 422, r"inputs[0]"),
        (b'{"inputs": [{"\\ud800": "\\ud800"}]}', 422, r"inputs[0]"),
        (b'{"inputs": [{"message": {"a": 1}}]}', 422, r"inputs[0]"),
        (b'{"inputs": [{"text": "a"}]}', 422, "lacks message"),
        (b'{"inputs": [{"message": null}]}', 422, "lacks message"),
        (b'{"inputs": ["a"], "scores": "yes"}', 422, "scores"),
        (b'{"inputs": ["a"], "score": true}', 422, "body"),
        (b'{"inputs": ["a"], "model": "none"}', 404, "v1/models"),
        (b'{"inputs": ["a"], "model": "returns@2"}', 404, "v1/models"),
        (b'{"inputs": ["a"], "model": ""}', 200, ""),
        (b'{"inputs": ["a"], "model": "quiz"}', 422, "choices"),
        (b'{"inputs": [{"question": "a", "choices": ["b"]}], "model": "quiz"}', 422, "choices"),
        (b'{"inputs": [{"question": "a", "choices": [1, 2]}], "model": "quiz"}', 422, r"inputs[0]"),
        (b'{"inputs": [{"message": NaN}]}', 200, ""),
        (b'{"inputs": [{"message": 1e999}]}', 200, ""),
        (b'{"inputs": [' + b'"a",' * 4 + b'"a"]}', 422, "5 of them"),
        (b'{"inputs": ["' + b"a" * 1001 + b'"]}', 422, "1,001 characters"),
        (b'{"inputs": ["' + b"a" * 5000 + b'"]}', 413, "5,000 bytes"),
    ],
)
def test_what_is_wrong_is_told(api: Asked, body: bytes, status: int, told: str) -> None:
    response = api("POST", "/v1/predict", content=body, headers={"Content-Type": "application/json"})
    if status == 200:
        assert response.status_code == 200
    else:
        assert told in refused(response, status)


def test_a_body_of_unknown_length_is_counted(api: Asked) -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b'{"inputs": ["' + b"a" * 100

    response = api("POST", "/v1/predict", content=endless(), headers={"Content-Type": "application/json"})
    assert "5,000 bytes" in refused(response, 413)


def test_paths_and_methods_that_are_not_there(api: Asked) -> None:
    refused(api("GET", "/v1/predict"), 405)
    refused(api("GET", "/absent"), 404)


def test_models_are_listed_with_what_a_page_needs(api: Asked) -> None:
    first, second = api("GET", "/v1/models").json()
    assert first["name"] == "returns"
    assert first["labels"] == ["refund", "replace", "repair", "decline"]
    assert first["examples"][0]["message"]
    assert second["kind"] == "row_choice"
    assert second["fields"][-1] == "choices"


def test_health_page_and_documentation_need_no_key(students: Students) -> None:
    keyed = Asked(students, Keys(["0" * 64]))
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert keyed("GET", path).status_code == 200
    assert "<script>" in keyed("GET", "/").text


def test_keys(students: Students) -> None:
    import hashlib

    keyed = Asked(students, Keys([hashlib.sha256(KEY.encode()).hexdigest(), "0" * 64]))
    body = {"inputs": ["a"]}
    assert keyed("POST", "/v1/predict", json=body, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    for headers in ({}, {"Authorization": KEY}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer"}):
        response = keyed("POST", "/v1/predict", content=b"{", headers=headers)
        refused(response, 401)
        assert response.headers["WWW-Authenticate"] == "Bearer"
    refused(keyed("GET", "/v1/models"), 401)


def test_the_log_has_a_line_for_each_request_and_no_input(api: Asked, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("serve.access")
    log.addHandler(caplog.handler)
    try:
        api("POST", "/v1/predict", json={"inputs": ["my secret", "b"]})
        api("POST", "/v1/predict", json={"inputs": ["my secret"], "my secret": 1})
        api("GET", "/my%20secret")
    finally:
        log.removeHandler(caplog.handler)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "serve.access"]
    assert [(line["path"], line["status"], line["request_id"]) for line in lines] == [
        ("/v1/predict", 200, "r-1"),
        ("/v1/predict", 422, "r-1"),
        ("other", 404, "r-1"),
    ]
    assert (lines[0]["model"], lines[0]["inputs"]) == ("returns", 2)
    assert "secret" not in json.dumps(lines)


def test_a_fault_of_the_server_is_said_and_its_words_stay_inside(
    students: Students, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students.pick("returns"), "predictor", None)
    assert "fault of the server" in refused(Asked(students)("POST", "/v1/predict", json={"inputs": ["a"]}), 500)


def test_more_requests_than_a_replica_holds_are_refused_and_told_when_to_come_back(
    students: Students, monkeypatch: pytest.MonkeyPatch
) -> None:
    student: Any = students.pick("returns")
    answer = student.answer

    async def ask_five() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        free = asyncio.Event()

        async def wait_then_answer(*given: Any) -> Any:
            await free.wait()
            return await answer(*given)

        monkeypatch.setattr(student, "answer", wait_then_answer)
        async with client_of(students) as client:
            asked = [asyncio.ensure_future(client.post("/v1/predict", json={"inputs": ["a"]})) for _ in range(5)]
            while sum(request.done() for request in asked) < 5 - LIMITS.requests:
                await asyncio.sleep(0)
            health = await client.get("/healthz")
            free.set()
            return await asyncio.gather(*asked), health, await client.post("/v1/predict", json={"inputs": ["a"]})

    made, health, later = asyncio.run(ask_five())
    assert sorted(response.status_code for response in made) == [200, 200, 503, 503, 503]
    assert [health.status_code, later.status_code] == [200, 200]
    full = next(response for response in made if response.status_code == 503)
    assert "2 requests are under way" in refused(full, 503)
    assert int(full.headers["Retry-After"]) >= 1


TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": JSON | st.lists(TEXT | st.fixed_dictionaries({"message": JSON}), max_size=5),
            "scores": JSON,
            "model": JSON | st.sampled_from(["returns", "quiz@1"]),
            "more": JSON,
        },
    )
)
def test_whatever_is_sent_nothing_breaks(api: Asked, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    response = api("POST", "/v1/predict", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code < 500, (body, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]


def test_the_page_is_there() -> None:
    assert Path(make_api.__code__.co_filename).with_name("playground.html").is_file()
