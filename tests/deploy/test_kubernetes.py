"""The Kubernetes manifests: they fit together, they fit the service, and the pods may do as little as possible."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard.metrics import Metrics
from guard.policy import Policy
from service.app import DRAIN_SECONDS
from service.routes import health, metrics
from service.settings import Settings
from tests.deploy.prometheus import DEPLOY

FOLDER = DEPLOY / "kubernetes"
PATCH = FOLDER / "bank-volume.yaml"
PAGE = DEPLOY.parent / "docs/monitoring.md"
LABELS = {"app.kubernetes.io/name": "sailguard"}


def manifests() -> dict[str, dict[str, Any]]:
    """Every manifest by its kind."""
    files = sorted(path for path in FOLDER.glob("*.yaml") if path.name not in {"policy.yaml", PATCH.name})
    loaded = [document for path in files for document in yaml.safe_load_all(path.read_text()) if "kind" in document]
    assert len({document["kind"] for document in loaded}) == len(loaded)
    return {document["kind"]: document for document in loaded}


ALL = manifests()
DEPLOYMENT = ALL["Deployment"]
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
PATHS = {getattr(route, "path", None) for router in (health.router, metrics.router) for route in router.routes}


@pytest.mark.parametrize("kind", sorted(set(ALL) - {"Kustomization"}))
def test_everything_bears_the_name_and_the_label(kind: str) -> None:
    assert ALL[kind]["metadata"]["name"] == "sailguard"
    assert ALL[kind]["metadata"]["labels"] == LABELS


def test_every_selector_finds_the_pods() -> None:
    assert DEPLOYMENT["spec"]["template"]["metadata"]["labels"] == LABELS
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == LABELS
    assert ALL["Service"]["spec"]["selector"] == LABELS
    assert ALL["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == LABELS
    assert ALL["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == LABELS
    assert ALL["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == ALL["Service"]["metadata"]["labels"]
    (spread,) = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == LABELS


def test_every_port_is_the_one_that_the_server_listens_on() -> None:
    (port,) = CONTAINER["ports"]
    assert str(port["containerPort"]) == ENVIRONMENT["SAILGUARD_PORT"]
    (service,) = ALL["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    (ingress,) = ALL["NetworkPolicy"]["spec"]["ingress"]
    assert [allowed["port"] for allowed in ingress["ports"]] == [port["name"]]
    (endpoint,) = ALL["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["port"] == service["name"]


@pytest.mark.parametrize(
    ("probe", "path"), [("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")]
)
def test_probes_ask_what_the_server_answers(probe: str, path: str) -> None:
    asked = CONTAINER[f"{probe}Probe"]["httpGet"]
    assert asked == {"path": path, "port": "http"}
    assert path in PATHS


def test_what_is_scraped_is_what_the_server_shows() -> None:
    (endpoint,) = ALL["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["path"] in PATHS
    (local,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert ALL["Service"]["metadata"]["name"] == local["job_name"]
    relabelings = [
        {re.sub("_(.)", lambda m: m[1].upper(), k): v for k, v in r.items()} for r in local["metric_relabel_configs"]
    ]
    assert endpoint["metricRelabelings"] == relabelings


def test_the_pods_may_do_as_little_as_possible() -> None:
    assert POD["automountServiceAccountToken"] is False
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & POD.keys()
    for amounts in CONTAINER["resources"].values():
        assert {"cpu", "memory"} <= amounts.keys()
    assert ALL["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_the_user_is_the_images() -> None:
    context = POD["securityContext"]
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile.split(" AS sidecar")[-1]


def test_requests_that_are_under_way_may_end() -> None:
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= pause + DRAIN_SECONDS + 10


def test_a_service_of_the_same_name_sets_no_variable() -> None:
    assert POD["enableServiceLinks"] is False


def test_variables_are_settings_with_values_that_the_server_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name.removeprefix("SAILGUARD_").lower() for name in ENVIRONMENT} <= Settings.model_fields.keys()
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-this-test\n")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = Settings(api_keys_file=keys)
    assert str(settings.threads) == CONTAINER["resources"]["limits"]["cpu"]


def test_every_file_that_a_variable_names_lies_in_a_mounted_folder() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert sorted(mounts.values()) == sorted(volumes)
    assert not any("subPath" in mount for mount in CONTAINER["volumeMounts"])
    for name in ("API_KEYS_FILE", "POLICY", "AUDIT"):
        assert str(Path(ENVIRONMENT[f"SAILGUARD_{name}"]).parent) in mounts
    (generated,) = ALL["Kustomization"]["configMapGenerator"]
    assert volumes["policy"]["configMap"]["name"] == generated["name"]
    assert generated["files"] == [Path(ENVIRONMENT["SAILGUARD_POLICY"]).name]


def test_the_policy_can_be_used() -> None:
    assert Policy.load(FOLDER / "policy.yaml").name == "cluster"


def test_the_patch_for_a_volume_of_banks_fits_the_deployment() -> None:
    patch = yaml.safe_load(PATCH.read_text())
    assert [patch[key] for key in ("apiVersion", "kind", "metadata")] == [
        DEPLOYMENT[key] for key in ("apiVersion", "kind", "metadata")
    ]
    pod = patch["spec"]["template"]["spec"]
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert container["name"] == CONTAINER["name"]
    (variable,), (mount,) = container["env"], container["volumeMounts"]
    assert variable["name"].removeprefix("SAILGUARD_").lower() in Settings.model_fields
    assert variable["value"] == mount["mountPath"]
    assert mount["name"] == volume["name"]
    assert volume["name"] not in {other["name"] for other in POD["volumes"]}
    assert mount["readOnly"] is volume["persistentVolumeClaim"]["readOnly"] is True


def test_a_roll_out_takes_no_pod_away_before_the_next_one_is_ready() -> None:
    assert DEPLOYMENT["spec"]["strategy"] == {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_the_secrets_are_made_as_the_page_says() -> None:
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    (endpoint,) = ALL["ServiceMonitor"]["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    page = PAGE.read_text(encoding="utf-8")
    made = dict(re.findall(r"create secret generic ([\w-]+) --from-file=(\w+)=", page))
    keys = Path(ENVIRONMENT["SAILGUARD_API_KEYS_FILE"]).name
    assert made == {volumes["keys"]["secret"]["secretName"]: keys, credentials["name"]: credentials["key"]}


def test_the_autoscaler_scales_these_pods_by_a_metric_that_exists() -> None:
    scaler = ALL["HorizontalPodAutoscaler"]["spec"]
    target = scaler["scaleTargetRef"]
    assert target == {key: DEPLOYMENT[key] for key in ("apiVersion", "kind")} | {"name": DEPLOYMENT["metadata"]["name"]}
    assert "replicas" not in DEPLOYMENT["spec"], "it would undo what the autoscaler did"
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {family.name for family in Metrics().registry.collect()}
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert scaler["minReplicas"] > ALL["PodDisruptionBudget"]["spec"]["maxUnavailable"]


def test_kustomize_lists_what_needs_nothing_but_kubernetes() -> None:
    listed = set(ALL["Kustomization"]["resources"])
    optional = {"monitor.yaml", "prometheus-adapter.yaml", PATCH.name}
    others = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml", "policy.yaml"}
    assert listed == others - optional
    (image,) = ALL["Kustomization"]["images"]
    assert image["name"] == CONTAINER["image"]
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    assert services["sidecar"]["image"] == f"{image['name']}:{image['newTag']}"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_renders_the_folder() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == sorted({*ALL, "ConfigMap"} - {"Kustomization", "ServiceMonitor"})
