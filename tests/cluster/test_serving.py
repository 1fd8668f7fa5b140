"""An endpoint under load whose nodes die: one with a replica; then the head, with GCS fault tolerance in a real Redis.

`pytest tests/cluster/test_serving.py -s` prints what failed and how long it took until all was as before.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.local import Node, cluster_folder, free_port
from pipelines.lineage import Lineage
from pipelines.pending import keys_on_disk
from pipelines.predictor import Predictor
from pipelines.recipe import load_recipe

pytestmark = pytest.mark.ray

TEXTS = ["The lamp stopped working.", "I changed my mind. " * 10, "It came broken, and I have the receipt."]
CLIENTS = 4
ASKED, BATCH = 120, 8


class Load:
    """Clients that ask without a pause, as long as the context lasts; what came of it.

    They never ask through the head, as with `excludeHeadPodFromServeSvc` in rayservice.yaml: here all proxies listen at
    one port, and the system deals out connections.
    """

    def __init__(self, url: str, expected: list[str | None], head: Node) -> None:
        self.url, self.expected, self.head = url, expected, head
        self.outcomes: Counter[str] = Counter()
        self.failures: list[tuple[float, str]] = []  # when, what
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask_together()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def wait_for_answers(self, count: int) -> None:
        """So many more right ones."""
        right = self.outcomes["right"]
        wait_for(lambda: self.outcomes["right"] >= right + count, failing=lambda: f"{self.outcomes}, {self.failures}")

    async def _ask_together(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(CLIENTS)))

    async def _client(self) -> None:
        while not self._done.is_set():
            async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
                outcome = await self._connect(client)
                while outcome == "right" and not self._done.is_set():
                    outcome = await self._ask(client)
                    self.outcomes[outcome] += 1
                if outcome not in ("right", "elsewhere"):
                    self.failures.append((time.time(), outcome))

    async def _connect(self, client: httpx.AsyncClient) -> str:
        """`elsewhere` where a load balancer would have connected to another node."""
        try:
            made = await client.get("/-/healthz")
        except httpx.HTTPError as error:
            return type(error).__name__
        _, port = made.extensions["network_stream"].get_extra_info("client_addr")
        return "right" if made.status_code == 200 and not is_peer(self.head, port) else "elsewhere"

    async def _ask(self, client: httpx.AsyncClient) -> str:
        try:
            made = await client.post("/v1/predict", json={"inputs": TEXTS})
        except httpx.HTTPError as error:
            return type(error).__name__
        if made.status_code != 200:
            return str(made.status_code)
        return "right" if [p["label"] for p in made.json()["predictions"]] == self.expected else "wrong"


class Endpoint:
    """A cluster with a head that may die and come back, and the students on two of its nodes."""

    def __init__(self, folder: Path, redis: str, nodes: ExitStack, bundle: str) -> None:
        self.folder, self.redis, self.nodes, self.bundle = folder, redis, nodes, bundle
        self.port, self.dashboard_port, self.http = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http}"
        self.head = self.start_head()
        self.address = self.head.address

    def start_head(self) -> Node:
        # or `ray start` takes the other nodes for a head that runs, as they are on this machine and name its address
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)
        environment = {"RAY_REDIS_ADDRESS": self.redis, "RAY_external_storage_namespace": "distill"}
        return self.nodes.enter_context(
            Node(
                self.folder,
                environment=environment,
                port=self.port,
                node_ip_address="127.0.0.1",
                redis_password="secret",
                dashboard_port=self.dashboard_port,
            )
        ).wait()

    def add_node(self) -> Node:
        """A worker that waits for a new head as long as KubeRay's operator makes them wait."""
        options: dict[str, Any] = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "labels": "ray-subcluster=serving"}
        environment = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        return self.nodes.enter_context(Node(self.folder, self.address, environment, **options)).wait()

    def deploy(self, file: Path) -> None:
        """As `serve deploy` does it, and nothing of this process is part of the cluster."""
        args: dict[str, Any] = {"bundles": [self.bundle], "require_key": False, "replicas": [2, 2], "cpus": 0.4}
        args |= {"node_labels": {"ray-subcluster": "serving"}}
        application: dict[str, Any] = {
            "name": "students",
            "route_prefix": "/",
            "import_path": "serve.app:build",
            "args": args,
        }
        application |= {"deployments": [{"name": "students", "max_replicas_per_node": 1}]}
        config = {"proxy_location": "EveryNode", "http_options": {"host": "127.0.0.1", "port": self.http}}
        file.write_text(yaml.safe_dump({**config, "applications": [application]}))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "--address", self.head.dashboard]
        tries: list[str] = []

        def deployed() -> bool:
            made = subprocess.run(command, check=False, capture_output=True, timeout=300, text=True)
            tries.append(made.stdout + made.stderr)
            return made.returncode == 0

        wait_for(deployed, failing=lambda: tries[-1])  # on a busy machine, Serve's proxies may start too late for it

    def submit(self, *overrides: str) -> str:
        """`distill submit rationales quickstart --detach`; what it says."""
        command = [sys.executable, "-m", "pipelines", "submit", "rationales", "quickstart", "--detach"]
        environment = os.environ | {"RAY_API_SERVER_ADDRESS": self.head.dashboard, "NO_PROXY": "127.0.0.1"}
        options = [part for override in overrides for part in ("--set", override)]
        made = subprocess.run(
            command + options, env=environment, check=True, capture_output=True, timeout=120, text=True
        )
        return made.stdout + made.stderr

    def get(self, path: str) -> Any:
        """What the dashboard says; nothing as long as it is away."""
        headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        try:
            return httpx.get(f"{self.head.dashboard}{path}", headers=headers, timeout=20).json()
        except (httpx.HTTPError, ValueError):
            return {}

    def replicas(self) -> list[str]:
        """The nodes of the replicas that run."""
        applications = self.get("/api/serve/applications/").get("applications", {})
        deployments = applications.get("students", {}).get("deployments", {})
        replicas = deployments.get("students", {}).get("replicas", [])
        return sorted(replica["node_id"] for replica in replicas if replica["state"] == "RUNNING")

    def alive(self) -> set[str]:
        nodes = self.get("/api/v0/nodes").get("data", {}).get("result", {}).get("result", [])
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]}


def wait_for(reached: Callable[[], object], seconds: float = 240, failing: Callable[[], object] = str) -> float:
    """How long it took."""
    start = time.time()
    while not reached():
        assert time.time() < start + seconds, failing()
        time.sleep(0.2)
    return time.time() - start


@contextmanager
def redis_server() -> Iterator[str]:
    """The address of one that wants a password."""
    port = free_port()
    options = ["--requirepass", "secret", "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    process = subprocess.Popen(["redis-server", "--port", str(port), *options], stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def endpoint(make_bundle: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    if not shutil.which("redis-server"):
        pytest.skip("a head that may die needs redis-server, which is not here")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", os.urandom(16).hex())
    with cluster_folder() as folder, redis_server() as redis, ExitStack() as nodes:
        yield Endpoint(folder, redis, nodes, make_bundle("returns", "1"))


def is_peer(node: Node, port: int) -> bool:
    """Whether a process of that node is at the other end of the connection from that port."""
    pids = [at.pid for at in psutil.net_connections("tcp") if at.raddr and at.raddr.port == port]
    with suppress(psutil.NoSuchProcess):
        return any(node.process.pid == parent.pid for pid in pids for parent in psutil.Process(pid).parents())
    return False  # it has just died


def holds(node: Node, name: str) -> bool:
    return any(name in " ".join(process.cmdline()) for process in node.process.children(recursive=True))


@pytest.mark.timeout(1200)
def test_an_endpoint_outlives_a_node_and_the_head(
    endpoint: Endpoint, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path_factory.mktemp("storage")
    expected = [made.label for made in Predictor.open(endpoint.bundle).predict(TEXTS)]
    workers = [endpoint.add_node(), endpoint.add_node()]
    endpoint.deploy(tmp_path / "serve.yaml")
    wait_for(lambda: len(set(endpoint.replicas())) == 2)
    assert not holds(endpoint.head, "ServeReplica")

    with Load(endpoint.url, expected, endpoint.head) as load:
        load.wait_for_answers(50)
        killed, victims = time.time(), set(endpoint.replicas())
        workers.pop(0).kill()
        workers.append(endpoint.add_node())
        wait_for(lambda: len(set(endpoint.replicas())) == 2 and set(endpoint.replicas()) != victims)
        recovered = time.time() - killed
    show("a node with a replica", load, killed, recovered)
    assert not load.outcomes["wrong"]
    # what is under way at its proxy, then what the others still send its replica
    assert len(load.failures) <= 2 * CLIENTS, load.failures

    monkeypatch.chdir(tmp_path)  # which is uploaded with the job
    overrides = [f"storage={storage}", f"source.limit={ASKED // 3}", f"teacher.batch_size={BATCH}", "teacher.cpus=0.5"]
    overrides.append("teacher.replicas=[1, 1]")
    generations = Lineage(load_recipe("quickstart", overrides)).generations
    endpoint.submit(*overrides)
    wait_for(lambda: len(keys_on_disk(generations)) >= ASKED // 4, failing=lambda: endpoint.get("/api/jobs/"))
    before, replicas = endpoint.alive(), endpoint.replicas()
    with Load(endpoint.url, expected, endpoint.head) as load:
        load.wait_for_answers(20)
        killed = time.time()
        endpoint.head.kill()
        told = len(keys_on_disk(generations))
        load.wait_for_answers(20)  # while there is no head
        endpoint.head = endpoint.start_head()
        wait_for(lambda: endpoint.alive() == before and endpoint.replicas() == replicas)
        recovered = time.time() - killed
    show("the head", load, killed, recovered)
    assert not load.failures

    assert len(keys_on_disk(generations)) >= told, "what the job had written stays"
    wait_for(lambda: "-2:" in endpoint.submit(*overrides))  # the first is known to be dead, once its node is
    waited = wait_for(lambda: len(keys_on_disk(generations)) == ASKED, failing=lambda: endpoint.get("/api/jobs/"))
    print(f"the job died with its head at {told} of {ASKED} texts; submitted again, it had all after {waited:.0f} s")


def show(lost: str, load: Load, killed: float, recovered: float) -> None:
    failed = [f"{outcome} at {at - killed:.1f} s" for at, outcome in load.failures]
    print(f"\nserving, {lost} killed: {load.outcomes['right']} right; {', '.join(failed) or 'none'} failed; ", end="")
    print(f"as before after {recovered:.0f} s")
