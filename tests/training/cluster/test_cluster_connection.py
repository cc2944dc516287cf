"""What stands in the way of a cluster is said before any work, and what is joined is left again."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from feature_bank.errors import DataError
from feature_bank.ray_cluster import connect
from guard.models import LoadedModel
from service.cli import build_app
from tests.training.cluster.conftest import TwoNodes
from tests.training.cluster.samples import RAY
from tests.training.samples import contents
from training.cluster.room import room
from training.cluster.shared import await_file, check_shared


def needs_ray(test: Any) -> Any:
    """Marks a test as those of the other files are."""
    for mark in RAY:
        test = mark(test)
    return test


HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def run(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    loaded = LoadedModel(tiny_model, tiny_tokenizer, "tiny")
    monkeypatch.setattr("guard.models.load_model", lambda *args, **options: loaded)
    rows = [{"text": f"{i:02d} is the number of a text"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sae = {"architecture": "topk", "expansion": 2, "options": {"k": 2}, "sweep": {"seed": [0, 1]}}
    sweep = {"hook_points": [HOOK], "max_tokens": 20, "batch_tokens": 64, "saes": [sae]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    def invoke(command: str, out: str, *options: str) -> Result:
        arguments = {
            "harvest": ["--hook-point", HOOK, "--shard-tokens", "200"],
            "saes": ["--config", str(tmp_path / "sweep.yaml")],
        }[command]
        common = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / out)]
        return CliRunner().invoke(build_app(), ["train", command, *arguments, *common, *options])

    return invoke


@pytest.mark.parametrize("command", ["harvest", "saes"])
def test_without_ray_the_error_names_the_extra(run: Any, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(command, "out", "--cluster", "auto")
    assert result.exit_code == 2
    assert "pip install 'sailguard[ray]'" in " ".join(result.stderr.split())


@needs_ray
def test_where_nothing_answers_the_error_says_so_in_seconds(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # bound, and nobody listens
        result = run("harvest", "out", "--cluster", f"127.0.0.1:{port}")
    assert result.exit_code == 2
    assert "nothing answers there" in " ".join(result.stderr.split())
    for address in ("here", "ray://head:10001", "head:"):
        with pytest.raises(DataError, match=r"--cluster '.*say auto, or HOST:PORT"), connect(address):
            pass
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(DataError, match=r"RAY_ADDRESS '.*say auto, or HOST:PORT"), connect("auto"):
            pass


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.cluster.shared.VISIBLE_SECONDS", 0.0)
    with pytest.raises(DataError, match=r"harvest\.json is not seen on machine .* storage that every machine"):
        check_shared(tmp_path / "harvest.json")
    with pytest.raises(DataError, match=r"shard: a worker wrote it, but it is not seen here"):
        await_file(tmp_path / "shard", 0.0)
    (tmp_path / "shard").touch()
    await_file(tmp_path / "shard", 0.0)


@needs_ray
def test_the_command_gives_on_a_cluster_what_it_gives_here(run: Any, two_nodes: TwoNodes, tmp_path: Path) -> None:
    import ray

    two_nodes.add_second()
    for out, options in (("here", ()), ("there", ("--cluster", two_nodes.address))):
        result = run("saes", out, *options, "--json")
        assert result.exit_code == 0, result.output
        assert "harvest" in result.stderr
        assert "train" in result.stderr
        assert [row["seed"] for row in json.loads(result.stdout)] == [0, 1]
        assert not ray.is_initialized()  # what was joined is left
    assert contents(tmp_path / "there/activations") == contents(tmp_path / "here/activations")
    found, expected = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*.safetensors")}
        for top in (tmp_path / "there/saes", tmp_path / "here/saes")
    )
    assert len(expected) == 2
    assert found == expected


@needs_ray
def test_room_is_what_the_nodes_offer(cluster: TwoNodes) -> None:
    assert room("cpu", 1) == (2, 1, 0)
    assert room("cpu", 8) == (2, 1, 0)  # a node has one CPU
    with pytest.raises(DataError, match="no machine of the cluster offers one"):
        room("cuda", 1)
