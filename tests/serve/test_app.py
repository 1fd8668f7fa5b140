"""The application on a real local Ray Serve, driven over HTTP on loopback."""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.local import free_port
from pipelines.predictor import Predictor
from pipelines.ray_session import ray_session
from serve.settings import Limits, Settings, Traffic
from tests.serve.server import distill_serve, replicas, wait_until_ready

pytestmark = pytest.mark.ray

KEYS = ("old key", "new key")
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}
TEXTS = ["The lamp stopped working.", "Übergröße 🧾\x00", "", "I changed my mind. " * 30]
ROW = {"question": "Where is a book kept?", "choices": ["library", "river", "mall"]}


@pytest.fixture(scope="module")
def bundles(make_bundle: Callable[..., str]) -> dict[str, str]:
    return {
        "returns@1": make_bundle("returns", "1", seed=1),
        "returns@2": make_bundle("returns", "2", seed=2),
        "quiz@1": make_bundle("quiz", "1", "cqa", seed=3),
    }


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("keys") / "hashes"
    file.write_text("".join(hashlib.sha256(key.encode()).hexdigest() + "\n" for key in KEYS))
    return str(file)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Ray Serve, without an application yet."""
    port = free_port()
    with ray_session():
        from ray import serve

        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def deploy(settings: Settings) -> None:
    from ray import serve

    from serve.app import build

    serve.run(build(settings))


def settings_of(bundles: dict[str, str], keys_file: str, *names: str, **given: Any) -> Settings:
    folders = [bundles[name] for name in names or bundles]
    return Settings.model_validate({"bundles": folders, "keys_file": keys_file, "cpus": 0.5, **given})


@pytest.fixture(scope="module")
def app(url: str, bundles: dict[str, str], keys_file: str) -> str:
    """All bundles, with small limits; the second version of returns answers."""
    limits = Limits(body_bytes=100_000, inputs=64, characters=5000)
    deploy(settings_of(bundles, keys_file, limits=limits, traffic=Traffic(shadow={"returns": "1"})))
    return url


def ask(url: str, headers: dict[str, str] = HEADERS, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/predict", json=body, headers=headers, timeout=60)


def test_answers_are_those_of_the_predictor(app: str, bundles: dict[str, str]) -> None:
    for name, model in (("returns@1", "returns@1"), ("returns@2", "returns"), ("returns@2", None)):
        expected = Predictor.open(bundles[name]).predict(TEXTS, scores=True)
        body = ask(app, inputs=TEXTS, scores=True, model=model).json()
        assert f"{body['model']}@{body['version']}" == name
        for shown, made in zip(body["predictions"], expected, strict=True):
            assert shown["label"] == made.label
            assert shown["scores"] == pytest.approx(made.scores, abs=1e-4)
            assert shown["abstained"] is made.abstained


def test_another_model_is_asked_by_its_name(app: str) -> None:
    body = ask(app, inputs=[ROW], model="quiz").json()
    assert body["predictions"][0]["label"] in ROW["choices"]
    assert [m["name"] for m in httpx.get(f"{app}/v1/models", headers=HEADERS).json()] == ["returns", "returns", "quiz"]


def test_under_load_each_request_gets_its_own_answers(app: str, bundles: dict[str, str]) -> None:
    batches = [[f"message {n}-{i} " * (1 + (n * 7 + i) % 40) for i in range(1 + n % 5)] for n in range(120)]
    expected = [[p.label for p in Predictor.open(bundles["returns@2"]).predict(batch)] for batch in batches]

    async def one(client: httpx.AsyncClient, batch: list[str]) -> list[str]:
        made = (await client.post("/v1/predict", json={"inputs": batch})).json()
        return [p["label"] for p in made["predictions"]]

    assert asyncio.run(together(app, [lambda c, b=batch: one(c, b) for batch in batches])) == expected


async def together(url: str, calls: list[Callable[..., Awaitable[Any]]]) -> list[Any]:
    """The calls at once, on one client."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60, limits=limits) as client:
        return await asyncio.gather(*(call(client) for call in calls))


def test_any_of_the_keys_opens_and_nothing_else(app: str) -> None:
    for key in KEYS:
        assert ask(app, {"Authorization": f"Bearer {key}"}, inputs=["a"]).status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        made = ask(app, headers, inputs=["a"])
        assert made.status_code == 401
        assert "API key" in made.json()["error"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b'{"inputs": []}', 422),
        (json.dumps({"inputs": ["a"] * 10_000}).encode(), 422),
        (b'{"inputs": ["' + b"a" * 5_000_000 + b'"]}', 413),
        (b'{"inputs": ["\\ud83e"]}', 422),
        (b'{"inputs": ["a"], "model": "none"}', 404),
    ],
)
def test_what_is_wrong_is_told_as_json_with_the_request_id(app: str, content: bytes, status: int) -> None:
    headers = {**HEADERS, "Content-Type": "application/json", "X-Request-ID": "mine"}
    made = httpx.post(f"{app}/v1/predict", content=content, headers=headers)
    assert made.status_code == status
    assert made.json()["error"]
    assert made.json()["request_id"] == made.headers["X-Request-ID"] == "mine"


def test_what_happened_is_counted(app: str) -> None:
    import ray

    for _ in range(5):
        ask(app, inputs=["count me", "and me", TEXTS[0]])  # of the last it is not sure
    ask(app, {}, inputs=["a"])
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = (
        'distill_requests_total{.*path="/v1/predict".*status="200"',
        'distill_rejected_total{.*reason="401"',
        'distill_labels_total{.*version="2"',
        "distill_batch_rows_count{",
        "distill_batch_tokens_count{",
        "distill_queue_ms_count{",
        "distill_model_ms_count{",
        "distill_abstained_total{",
        'distill_shadowed_total{.*version="1"',
    )
    import re

    deadline = time.monotonic() + 60  # the agent gathers them every few seconds
    while True:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        lacking = [series for series in wanted if not re.search(series, text)]
        if not lacking or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert not lacking
    assert "count me" not in text


def test_more_than_it_can_take_gets_503_and_it_recovers(
    url: str, app: str, bundles: dict[str, str], keys_file: str
) -> None:
    deploy(settings_of(bundles, keys_file, "returns@1", limits=Limits(requests=6)))

    async def one(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/predict", json={"inputs": ["a message " * 30] * 64})

    made = asyncio.run(together(url, [one] * 60))
    statuses = Counter(response.status_code for response in made)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= 6
    refused = next(response for response in made if response.status_code == 503)
    assert int(refused.headers["Retry-After"]) >= 1
    assert "under way" in refused.json()["error"]
    assert ask(url, inputs=["a"]).status_code == 200


class Load:
    """Requests, eight at a time, until it is left; what came of them."""

    def __init__(self, url: str) -> None:
        self.url, self.statuses, self.versions = url, Counter[object](), Counter[str]()

    async def during(self, work: Callable[[], None]) -> None:
        done = asyncio.Event()

        async def client_loop() -> None:
            async with httpx.AsyncClient(base_url=self.url, headers=HEADERS, timeout=60) as client:
                while not done.is_set():
                    try:
                        made = await client.post("/v1/predict", json={"inputs": TEXTS})
                        self.statuses[made.status_code] += 1
                        if made.status_code == 200:
                            self.versions[made.json()["version"]] += 1
                    except httpx.HTTPError as error:
                        self.statuses[type(error).__name__] += 1

        async def worker() -> None:
            await asyncio.to_thread(work)
            await asyncio.sleep(2)
            done.set()

        await asyncio.gather(worker(), *(client_loop() for _ in range(8)))


def test_a_new_version_takes_over_without_a_failed_request(url: str, bundles: dict[str, str], keys_file: str) -> None:
    deploy(settings_of(bundles, keys_file, "returns@1"))
    load = Load(url)
    asyncio.run(load.during(lambda: deploy(settings_of(bundles, keys_file, "returns@2"))))
    assert set(load.statuses) == {200}, load.statuses
    assert set(load.versions) == {"1", "2"}
    assert ask(url, inputs=["a"]).json()["version"] == "2"


def test_a_killed_replica_costs_at_most_what_was_under_way(url: str, bundles: dict[str, str], keys_file: str) -> None:
    deploy(settings_of(bundles, keys_file, "returns@1", replicas=[2, 2]))

    def kill_one() -> None:
        time.sleep(1)
        both = replicas(os.getpid())
        assert len(both) == 2
        both[0].kill()
        time.sleep(8)

    load = Load(url)
    asyncio.run(load.during(kill_one))
    failed = load.statuses.total() - load.statuses[200]
    assert load.statuses[200] > 100
    assert failed <= 8, load.statuses


def test_traffic_is_split_by_shares_and_rolled_back_without_a_restart(
    url: str, bundles: dict[str, str], keys_file: str
) -> None:
    """As `serve deploy` does it: the file changes its user_config alone."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    folders = [bundles["returns@1"], bundles["returns@2"]]
    args = settings_of(bundles, keys_file).model_dump(mode="json") | {"bundles": folders}

    def split(shares: dict[str, float]) -> Counter[str]:
        config = {"name": "students", "user_config": Traffic(shares={"returns": shares}).model_dump()}
        application = {"name": "default", "import_path": "serve.app:build", "args": args, "deployments": [config]}
        client = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}), _blocking=True)
        deadline, seen = time.monotonic() + 60, Counter[str]()
        while set(seen) != {version for version, share in shares.items() if share} and time.monotonic() < deadline:
            seen = Counter(ask(url, inputs=["a"]).json()["version"] for _ in range(60))
        return seen

    split({"1": 0.5, "2": 0.5})
    before = {replica.pid for replica in replicas(os.getpid())}
    canary = split({"1": 0.8, "2": 0.2})
    assert 0 < canary["2"] < canary["1"]
    assert set(split({"1": 1.0, "2": 0.0})) == {"1"}
    assert {replica.pid for replica in replicas(os.getpid())} == before


def test_a_bundle_that_was_touched_is_not_served(url: str, make_bundle: Callable[..., str], keys_file: str) -> None:
    folder = make_bundle("touched", "1")
    with Path(folder, "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(RuntimeError, match=r"tokenizer\.json|unhealthy|failed"):
        deploy(Settings(bundles=(folder,), keys_file=keys_file, cpus=0.5))


@pytest.mark.parametrize("options", [[], ["--proxy"]])
def test_distill_serve_answers_and_finishes_what_is_under_way_when_told_to_stop(
    bundles: dict[str, str], options: list[str]
) -> None:
    port = free_port()
    process = distill_serve(bundles["returns@1"], "--port", str(port), *options)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        assert ask(url, {}, inputs=TEXTS).status_code == 200

        async def stop_within() -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as client:
                long = client.post(f"{url}/v1/predict", json={"inputs": ["a message " * 30] * 256})
                waiting = asyncio.create_task(long)
                await asyncio.sleep(0.1)
                process.send_signal(signal.SIGTERM)
                return await waiting

        made = asyncio.run(stop_within())
        assert made.status_code == 200
        assert len(made.json()["predictions"]) == 256
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_killed_replica_is_replaced_at_its_port(bundles: dict[str, str]) -> None:
    port = free_port()
    process = distill_serve(bundles["returns@1"], "--port", str(port))
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        before = ask(url, {}, inputs=TEXTS).json()["predictions"]
        replicas(process.pid)[0].kill()
        time.sleep(1)
        wait_until_ready(process, url)
        assert ask(url, {}, inputs=TEXTS).json()["predictions"] == before
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/absent"], "/absent"),
        (["TOUCHED"], "model.safetensors"),
        (["BUNDLE", "--host", "0.0.0.0"], "API key is required"),
        (["BUNDLE", "--keys-file", "/absent"], "/absent"),
        (["BUNDLE", "--default", "other"], "other"),
        (["BUNDLE", "--host", "203.0.113.1", "--no-key"], "203.0.113.1"),
    ],
)
def test_distill_serve_says_in_a_sentence_what_is_wrong(
    bundles: dict[str, str], tmp_path: Path, arguments: list[str], told: str
) -> None:
    touched = shutil.copytree(bundles["returns@1"], tmp_path / "touched")
    weights = touched / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    places = {"BUNDLE": bundles["returns@1"], "TOUCHED": str(touched)}
    process = distill_serve(*[places.get(argument, argument) for argument in arguments])
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 2
    assert told in error
    assert "Traceback" not in error
