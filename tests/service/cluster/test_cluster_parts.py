"""The parts of serving on a cluster that need no cluster: turns, pages, numbered files, and what is refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import yaml
from typer.testing import CliRunner, Result

from feature_bank.errors import DataError
from guard.metrics import Metrics
from service.cli import build_app
from service.cluster import build
from service.cluster.files import NumberedFile
from service.cluster.pages import merged
from service.cluster.replica import OneSender, own_settings
from service.cluster.turns import Turns, turn_of
from service.errors import SettingsError
from service.settings import Settings
from service.worker import plain_values
from tests.deploy.prometheus import DEPLOY

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # its own, not ours
CONFIG: dict[str, Any] = yaml.safe_load((DEPLOY / "ray/serve.yaml").read_text())


class Handle:
    """A handle on an object in this process."""

    def __init__(self, turns: Turns) -> None:
        self.take = SimpleNamespace(remote=turns.take)
        self.give = SimpleNamespace(remote=turns.give)


def test_one_replica_at_a_time_has_its_turn() -> None:
    turns, loading, most = Turns(), 0, 0

    async def load(name: str) -> None:
        nonlocal loading, most
        async with turn_of(name, Handle(turns), structlog.get_logger()):
            loading += 1
            most = max(most, loading)
            await asyncio.sleep(0)
            loading -= 1

    async def run() -> None:
        await asyncio.gather(*(load(str(i)) for i in range(5)))

    asyncio.run(run())
    assert most == 1


def test_a_turn_of_a_dead_replica_ends_and_without_turns_a_version_is_loaded_all_the_same() -> None:
    lines: list[dict[str, Any]] = []

    def keep(_logger: Any, _name: str, event: dict[str, Any]) -> Any:
        lines.append(event)
        raise structlog.DropEvent

    async def run() -> None:
        turns = Turns(lease=0.01)
        await turns.take("dead")
        await turns.take("next")
        await turns.give("dead")  # it is not its turn any more
        endless = Turns()
        await endless.take("another")
        entered = False
        async with turn_of("late", Handle(endless), structlog.wrap_logger(None, processors=[keep]), patience=0.01):
            entered = True
        assert entered

    asyncio.run(run())
    assert [line["event"] for line in lines] == ["loading out of turn"]


def test_a_page_of_all_replicas_has_each_family_once_and_each_series_under_its_replica() -> None:
    first, second = Metrics(), Metrics()
    first.count_request("prompt", "flag")
    second.count_request("prompt", "flag")
    second.observe_batch(3)
    page = merged({"a": first.render(), "b": second.render()}).decode()
    assert page.count("# TYPE sailguard_requests_total counter") == 1
    for line in (
        'sailguard_requests_total{phase="prompt",replica="a",result="flag"} 1.0',
        'sailguard_requests_total{phase="prompt",replica="b",result="flag"} 1.0',
        'sailguard_batch_texts_bucket{le="4.0",replica="a"} 0.0',
        'sailguard_batch_texts_bucket{le="4.0",replica="b"} 1.0',
    ):
        assert line in page.splitlines()
    alone = first.render().decode().splitlines()
    assert len(merged({"a": first.render()}).decode().splitlines()) == len(alone)


def test_each_process_has_a_number_of_its_own_and_the_next_one_goes_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "audits" / "audit.sqlite"
    held = NumberedFile("audit", path)
    assert held.path == path.with_name("audit.0.sqlite")
    code = "import sys; from pathlib import Path; from service.cluster.files import NumberedFile as N; "
    code += "print(N('audit', Path(sys.argv[1])).path.name)"
    for _ in range(2):  # the number is free again when the process has ended
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "audit.1.sqlite"
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="setting 'spool'"):
        NumberedFile("spool", tmp_path / "file" / "spool.sqlite")


def test_an_address_that_a_client_gives_itself_is_left_out() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    for kind in ("http", "lifespan"):
        asyncio.run(OneSender(app)({"type": kind, "client": ("203.0.113.9", 1), "path": "/"}, None, None))  # type: ignore[arg-type]
    assert seen == [
        {"type": "http", "client": None, "path": "/"},
        {"type": "lifespan", "client": ("203.0.113.9", 1), "path": "/"},
    ]


def test_a_replica_without_keys_refuses_a_serve_that_other_machines_reach(tmp_path: Path) -> None:
    values = plain_values(Settings(audit=tmp_path / "audit.sqlite"))
    settings, files = own_settings(values, ("127.0.0.1", 8000))
    assert (settings.port, settings.audit, len(files)) == (8000, tmp_path / "audit.0.sqlite", 1)
    with pytest.raises(SettingsError, match="no API keys are set"):
        own_settings(values, ("0.0.0.0", 8000))
    settings, _ = own_settings({**values, "api_keys": "a-long-enough-key"}, ("0.0.0.0", 8000))
    assert settings.key_ring()


def run_command(*options: str) -> Result:
    return CliRunner().invoke(build_app(), ["serve", *options])


def said(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def test_without_ray_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run_command("--cluster", "auto", "--model", str(tmp_path))
    assert result.exit_code == 2
    assert "pip install 'sailguard[ray]'" in said(result)
    with pytest.raises(DataError, match=r"pip install 'sailguard\[ray\]'"):
        build({"model": str(tmp_path)})


@pytest.mark.ray
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--cluster", "auto", "--engine", "transformers"], "--cluster serves the sidecar"),
        (["--cluster", "auto"], "setting 'model'"),
        (["--cluster", "auto", "--model", ".", "--workers", "2"], "say how many with --replicas"),
        (["--cluster", "auto", "--model", ".", "--replicas", "3", "--max-replicas", "2"], "the most not below it"),
        (["--cluster", "auto", "--model", ".", "--host", "0.0.0.0"], "no API keys are set"),
        (["--replicas", "2"], "go with --cluster"),
    ],
)
def test_what_does_not_fit_replicas_is_refused_before_the_cluster_is_joined(options: list[str], problem: str) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    result = run_command(*options)
    assert result.exit_code == 2
    assert problem in said(result)


@pytest.mark.ray
def test_replicas_are_told_whole_paths_and_follow_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sidecar").mkdir()
    (tmp_path / "current").symlink_to("sidecar")
    application = build({"model": "current", "policy": "monitor", "audit": "audit.sqlite"})
    values, *_ = application._bound_deployment.init_args
    told = [values[name] for name in ("model", "policy", "audit", "threads")]
    assert told == [str(tmp_path / "current"), "monitor", str(tmp_path / "audit.sqlite"), 1]


@pytest.mark.ray
def test_replicas_have_to_follow_the_files(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(SettingsError, match="follow the bank's"):
        build({"model": str(tmp_path), "watch_seconds": "0"})
    with pytest.raises(SettingsError, match="replicas='two' is no number"):
        build({"model": str(tmp_path), "replicas": "two"})
    with pytest.raises(SettingsError, match="setting 'banks'"):
        build({"model": str(tmp_path), "banks": "x"})


@pytest.mark.ray
def test_the_config_file_for_serve_is_valid_and_names_settings_that_exist(tmp_path: Path) -> None:
    (application,) = CONFIG["applications"]
    assert application["import_path"] == "service.cluster:build"
    arguments = application["args"]
    assert set(arguments) - {"replicas", "max_replicas"} <= set(Settings.model_fields)
    assert CONFIG["http_options"]["host"] == "127.0.0.1"
    assert CONFIG["logging_config"]["enable_access_log"] is False
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(CONFIG)
    given = {name: value for name, value in arguments.items() if name != "api_keys_file"}
    assert build({**given, "model": str(tmp_path)}) is not None
