"""What the Helm chart promises: the settings of `ratchet up`, and pods that may do little."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ratchet.config.params import Config
from ratchet.services.environment import NO_TELEMETRY, service_environment
from ratchet.services.specs import plan_services

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy" / "chart"
TOOLS = ROOT / ".venv-kubernetes" / "bin"
SETS = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
pytestmark = pytest.mark.skipif(
    not (TOOLS / "helm").exists(), reason="helm is missing: `make lint` puts it into .venv-kubernetes"
)


def render(values: str, *more: str) -> list[dict[str, Any]]:
    path = CHART / "ci" / f"{values}.yaml"
    done = subprocess.run(
        [str(TOOLS / "helm"), "template", "r", str(CHART), "--values", str(path), *more],
        check=True,
        capture_output=True,
        text=True,
    )
    return [found for found in YAML(typ="safe").load_all(done.stdout) if found]


def pods(values: str) -> dict[str, dict[str, Any]]:
    """Return component → what its pods are: those of the deployments, and the jobs' by Prefect's template."""
    found = render(values)
    made = {
        one["metadata"]["labels"]["app.kubernetes.io/component"]: one["spec"]["template"]["spec"]
        for one in found
        if one["kind"] == "Deployment"
    }
    for one in found:
        if one["kind"] == "ConfigMap":
            template = json.loads(one["data"]["job-template.json"])
            made["job"] = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    return made


def variables(pod: dict[str, Any]) -> dict[str, str | None]:
    """Return the environment of a pod's container; None: the value comes from a secret."""
    return {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}


def kinds(values: str) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in render(values)}


def test_there_are_three_sets_of_values():
    assert SETS == ["autoscaling", "gpu", "minimal"]


@pytest.mark.parametrize("values", SETS)
def test_pods_get_what_up_sets(values, monkeypatch, tmp_path):
    """Nothing is missing of what `ratchet up` gives a service; only paths and addresses differ."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "PREFECT_", "OMP_")):
            monkeypatch.delenv(name)
    plans, ours = plan_services(tmp_path, Config()), pods(values)
    itself = service_environment(tmp_path, Config()).keys() - {"PREFECT_API_URL"}  # what a flow sets
    services = [
        ("mlflow", "mlflow"),
        ("prefect", "prefect"),
        ("deployments", "worker"),
        ("gateway", "gateway"),
    ]
    services += [("deployments", "job")] if "job" in ours else []
    for service, part in services:
        given = variables(ours[part])
        wanted = {
            name: value
            for name, value in plans[service].environment.items()
            if name not in os.environ
            and name not in NO_TELEMETRY
            and not (service == "deployments" and name in itself)
        }
        assert wanted, service
        assert wanted.keys() - given.keys() == set(), part
        same = {name: value for name, value in wanted.items() if "/" not in value}
        assert same == {name: given[name] for name in same}, part
        if part in ("worker", "gateway"):
            assert ours[part]["containers"][0]["command"][1:] == plans[service].command[1:]


# What compose sets and the chart does not, and why.
IN_COMPOSE_ALONE = {
    "PGPASSFILE": "the database's URL holds the password, and comes from a secret",
    "AWS_SHARED_CREDENTIALS_FILE": "the store's keys are variables of existingEnvironmentSecret",
    "AWS_DEFAULT_REGION": "of the store outside, with its keys",
    "AWS_ENDPOINT_URL_S3": "compose brings a store; here mlflow.s3Endpoint names one",
    "MLFLOW_S3_ENDPOINT_URL": "compose brings a store; here mlflow.s3Endpoint names one",
    "PREFECT_PROFILES_PATH": "PREFECT_API_AUTH_STRING is a variable, from a secret",
    "RATCHET_MLFLOW_PAGE": "compose publishes ports on this machine; a cluster has its own ways in",
    "RATCHET_GATEWAY_PAGE": "compose publishes ports on this machine; a cluster has its own ways in",
    "PREFECT_UI_URL": "compose publishes ports on this machine; a cluster has its own ways in",
    "RATCHET_GATEWAY_LISTEN": "gateway.host is 0.0.0.0 in the project of a cluster (docs/kubernetes.md)",
}


def test_pods_get_what_the_containers_of_compose_get():
    services = YAML(typ="safe").load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))[
        "services"
    ]
    ours = pods("minimal")
    missing = set[str]()
    for part in ("mlflow", "prefect", "worker", "gateway"):
        wanted = services[part].get("environment", {}).keys() - NO_TELEMETRY.keys()
        assert wanted, part
        missing |= wanted - variables(ours[part]).keys()
    assert missing == IN_COMPOSE_ALONE.keys()


def test_a_store_of_ones_own_is_named_to_those_that_use_it():
    ours = {part: variables(pod) for part, pod in pods("gpu").items()}
    assert ours["mlflow"]["MLFLOW_S3_ENDPOINT_URL"] == "http://seaweedfs:8333"
    assert (
        ours["worker"]["AWS_ENDPOINT_URL_S3"] == ours["job"]["AWS_ENDPOINT_URL_S3"] == "http://seaweedfs:8333"
    )


@pytest.mark.parametrize("values", SETS)
def test_no_pod_may_write_its_root_or_be_root(values):
    found = pods(values)

    assert {"gateway", "mlflow", "prefect", "worker"} <= found.keys()
    for part, pod in found.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, part
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, part
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, part


@pytest.mark.parametrize("values", SETS)
def test_passwords_come_from_secrets_alone(values):
    secret = {"MLFLOW_BACKEND_STORE_URI", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "RATCHET_REQUEST_LOG_URL"}
    secret |= {"PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING", "RATCHET_UPSTREAM_KEY"}
    found = [(name, value) for pod in pods(values).values() for name, value in variables(pod).items()]

    assert "Secret" not in kinds(values)
    assert len([name for name, _ in found if name in secret]) >= 6
    assert [name for name, value in found if name in secret and value is not None] == []


def test_only_what_runs_flows_reaches_the_servers():
    policies = {
        one["metadata"]["name"]: one["spec"] for one in render("gpu") if one["kind"] == "NetworkPolicy"
    }
    let_in = policies["r-servers"]["ingress"][0]["from"][0]["podSelector"]["matchExpressions"][0]

    assert policies["r-default"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policies["r-default"]
    assert set(let_in["values"]) == {"worker", "jobs", "job"}
    template = json.loads(kinds("gpu")["ConfigMap"]["data"]["job-template.json"])
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] in let_in["values"]


def test_the_gateway_scales_on_a_metric_of_its_own():
    from ratchet.config.serving import GatewayConfig

    found = kinds("autoscaling")
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    metric = scaler["metrics"][0]["pods"]
    text = (ROOT / "ratchet" / "gateway" / "state.py").read_text(encoding="utf-8")
    default = YAML(typ="safe").load((CHART / "values.yaml").read_text(encoding="utf-8"))["gateway"]

    assert f'"{metric["metric"]["name"]}"' in text
    assert metric["target"] == {"type": "AverageValue", "averageValue": "24"}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 12)
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert default["autoscaling"]["target"] == GatewayConfig().max_batch
    assert default["port"] == GatewayConfig().port
    assert default["drainSeconds"] == GatewayConfig().drain_seconds
    scaled = next(
        one["spec"]
        for one in render("autoscaling")
        if one["kind"] == "Deployment" and one["metadata"]["name"] == "r-gateway"
    )
    assert "replicas" not in scaled  # the autoscaler's, not the chart's


def test_a_job_of_the_pool_is_a_valid_manifest_with_a_gpu(tmp_path):
    template = json.loads(kinds("gpu")["ConfigMap"]["data"]["job-template.json"])
    values: dict[str, Any] = {
        name: of.get("default", {"object": {}, "integer": 600}.get(of["type"], "retrain"))
        for name, of in template["variables"]["properties"].items()
    }
    manifest = fill(template["job_configuration"]["job_manifest"], values)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["args"] = container["args"].split()  # as Prefect's worker does
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(manifest))
    subprocess.run([str(TOOLS / "kubernetes-validate"), "--strict", "--quiet", str(path)], check=True)

    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["image"] == "registry.example.org/ratchet-trainer:1.2.3"


def fill(part: Any, values: dict[str, Any]) -> Any:
    """Fill the places of Prefect's variables: a whole value keeps its type."""
    if isinstance(part, dict):
        return {key: fill(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [fill(value, values) for value in part]
    for name, value in values.items():
        if part == f"{{{{ {name} }}}}":
            return value
        part = part.replace(f"{{{{ {name} }}}}", str(value)) if isinstance(part, str) else part
    return part


def test_a_chart_without_a_project_is_refused(tmp_path):
    done = subprocess.run(
        [str(TOOLS / "helm"), "template", "r", str(CHART)], check=False, capture_output=True, text=True
    )

    assert done.returncode != 0
    assert "/project/repository" in done.stderr
