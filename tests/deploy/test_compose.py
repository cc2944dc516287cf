"""The compose file: hardened, reachable from its machine alone, and nothing in it points into the void."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.app import DRAIN_SECONDS
from service.settings import Settings
from tests.deploy.prometheus import DEPLOY

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NAMES = sorted(SERVICES)


@pytest.mark.parametrize("name", NAMES)
def test_a_container_may_do_as_little_as_possible(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not str(service["user"]).startswith("0")
    assert {"mem_limit", "healthcheck", "restart"} <= service.keys()
    assert "privileged" not in service


@pytest.mark.parametrize("name", NAMES)
def test_ports_are_open_to_this_machine_alone(name: str) -> None:
    assert SERVICES[name]["ports"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


@pytest.mark.parametrize("name", NAMES)
def test_what_is_mounted_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (DEPLOY / source).exists(), volume
            assert volume.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]
    assert set(SERVICES[name].get("secrets", [])) <= COMPOSE["secrets"].keys()
    assert set(SERVICES[name].get("depends_on", {})) <= SERVICES.keys()


def test_no_secret_is_in_the_file() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert re.fullmatch(r"\$\{[A-Z_]+:\?.+\}", secret["file"]), name
        assert any(name in service.get("secrets", []) for service in SERVICES.values())


def test_the_sidecar_is_the_image_that_the_dockerfile_builds() -> None:
    sidecar = SERVICES["sidecar"]
    dockerfile = (DEPLOY / sidecar["build"]["context"] / "Dockerfile").read_text()
    assert re.search(rf"^FROM \S+ AS {sidecar['build']['target']}$", dockerfile, re.MULTILINE)
    assert f"USER {sidecar['user']}" in dockerfile.split(f"AS {sidecar['build']['target']}")[-1]


def test_requests_that_are_under_way_may_end() -> None:
    assert int(SERVICES["sidecar"]["stop_grace_period"].removesuffix("s")) >= DRAIN_SECONDS + 10


def test_the_sidecars_variables_are_settings() -> None:
    environment: dict[str, str] = SERVICES["sidecar"]["environment"]
    assert {name.removeprefix("SAILGUARD_").lower() for name in environment} <= Settings.model_fields.keys()
    assert environment["SAILGUARD_API_KEYS_FILE"].removeprefix("/run/secrets/") in SERVICES["sidecar"]["secrets"]


def test_the_values_are_ones_that_the_server_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-for-this-test\n")
    for name, value in SERVICES["sidecar"]["environment"].items():
        monkeypatch.setenv(name, value)
    settings = Settings(api_keys_file=keys)
    assert f"127.0.0.1:{settings.port}:{settings.port}" in SERVICES["sidecar"]["ports"]
    assert f":{settings.port}/readyz" in SERVICES["sidecar"]["healthcheck"]["test"][-1]


def test_prometheus_finds_the_sidecar_and_has_the_same_rules() -> None:
    inside = yaml.safe_load((DEPLOY / "prometheus-compose.yml").read_text())
    outside = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert inside["rule_files"] == outside["rule_files"]
    (job,), (local,) = inside["scrape_configs"], outside["scrape_configs"]
    assert job["job_name"] == local["job_name"]
    assert job["metric_relabel_configs"] == local["metric_relabel_configs"]
    assert job["static_configs"] == [{"targets": ["sidecar:8801"]}]
    key = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert key in SERVICES["prometheus"]["secrets"]
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in ("prometheus.yml", *inside["rule_files"])} <= mounted
