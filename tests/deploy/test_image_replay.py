"""The replay passes over nothing: each instruction is carried out in the stage's own folder, or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.dockerfile import ROOT, load_script, step

dockerfile = load_script("dockerfile.py")
steps = load_script("image_steps.py")
replay_image = load_script("replay-image")

SERVER = """
import http.server, json, os, pathlib
{before}
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer({{"model": "tiny"}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({{"results": [{{"flagged": False}}]}})
    def log_message(self, *_):
        pass
with http.server.HTTPServer(("127.0.0.1", int(os.environ["SAILGUARD_PORT"])), Handler) as server:
    server.serve_forever()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a context to build from. The image's Python is this one, since a fresh one takes seconds."""

    def link_python(_self: Any, _image: str, root: Any) -> None:
        (root.prefix / "bin").mkdir(parents=True)
        (root.prefix / "bin/python").symlink_to(sys.executable)

    monkeypatch.setattr(steps.Replay, "_python", link_python)
    folder = tmp_path / "project"
    (folder / "package/__pycache__").mkdir(parents=True)
    (folder / "package/module.py").write_text("NAME = 'module'\n")
    (folder / "package/__pycache__/module.pyc").write_bytes(b"stale")
    (folder / "notes.txt").write_text("notes\n")
    (folder / "secret.env").write_text("secret\n")
    (folder / ".dockerignore").write_text("*\n!package\n!notes.txt\n**/__pycache__\n")
    return folder


def replay(project: Path, text: str, target: str = "image", **arguments: Any) -> Any:
    """Replay the stage `target` of the Dockerfile `text`, and return its root."""
    (project / "Dockerfile").write_text(text)
    work = project.parent / "work"
    work.mkdir()
    given = {"arguments": {}, "sidecar": None} | arguments
    return steps.Replay(project, work, **given).stage(target)


def test_continued_lines_and_comments_are_one_instruction() -> None:
    found = step("RUN python -V \\\n# between\n    && pip check")
    assert (found.name, found.value) == ("RUN", "python -V && pip check")


@pytest.mark.parametrize(
    "text",
    [
        "FROM python:3.11\nADD a b",
        'FROM python:3.11\nSHELL ["bash"]',
        "FROM python:3.11\nONBUILD RUN python -V",
        "RUN python -V\nFROM python:3.11",
        "FROM python:3.11 AS a\nFROM python:3.11 AS a",
        "FROM ${NOWHERE}",
        "FROM python:3.11\nRUN python \\",
        "",
    ],
)
def test_what_the_parser_does_not_know_is_refused(text: str) -> None:
    with pytest.raises(dockerfile.DockerfileError):
        dockerfile.parse(text)


@pytest.mark.parametrize(
    "command",
    ["python -V; rm -rf x", "python -V | tee x", "python -V || true", "python $(which x)", "python `x`", "python > x"],
)
def test_of_a_shell_only_a_chain_of_commands_is_known(command: str) -> None:
    with pytest.raises(dockerfile.DockerfileError):
        dockerfile.split_commands(step(f"RUN {command}"), {})


def test_commands_are_split_with_their_own_variables() -> None:
    found = dockerfile.split_commands(
        step('RUN INDEX="$WHERE" pip install "a b" && python -c "import os; os"'), {"WHERE": ""}
    )
    assert [(dict(one.environment), one.words) for one in found] == [
        ({"INDEX": ""}, ("pip", "install", "a b")),
        ({}, ("python", "-c", "import os; os")),
    ]


def test_a_variable_that_is_not_set_is_refused() -> None:
    with pytest.raises(dockerfile.DockerfileError, match=r"\$NOWHERE is not set"):
        dockerfile.split_commands(step("RUN python ${NOWHERE}"), {"SOMEWHERE": "x"})


@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("package/module.py", False),
        ("package/deep/module.py", False),
        ("package/deep/__pycache__/module.pyc", True),
        ("__pycache__/a", True),
        ("deploy/list.txt", False),
        ("deploy/other.txt", True),
        (".git/config", True),
        ("package/deep/a.so", True),
    ],
)
def test_the_last_pattern_that_matches_decides(path: str, left_out: bool) -> None:
    rules = dockerfile.IgnoreRules("# comment\n*\n!package\n!deploy/list.txt\n**/__pycache__\n**/*.so\n")
    assert rules.leaves_out(path) is left_out


@pytest.mark.parametrize(
    ("word", "moved"),
    [
        ("/opt/x", "R/opt/x"),
        ("--out=/opt/x", "R/opt/x"),
        ("-d=/opt", "R/opt"),
        ("/opt/../../../etc", "R/etc"),
        ("relative", "relative"),
        ("a+rX", "a+rX"),
        ("https://example.org/x", "https://example.org/x"),
    ],
)
def test_absolute_paths_are_moved_into_the_root_and_nothing_leads_out(tmp_path: Path, word: str, moved: str) -> None:
    prefix = word.partition("=")[0] + "=" if "=" in word else ""
    expected = prefix + moved.replace("R/", f"{tmp_path}/") if moved.startswith("R/") else moved
    assert steps.Root(folder=tmp_path).word(word) == expected


def test_files_are_copied_but_those_that_the_context_leaves_out(project: Path) -> None:
    root = replay(project, "FROM python:3.11 AS image\nWORKDIR /src\nCOPY notes.txt ./\nCOPY package package\n")
    found = sorted(str(path.relative_to(root.folder)) for path in (root.folder / "src").rglob("*"))
    assert found == ["src/notes.txt", "src/package", "src/package/module.py"]


@pytest.mark.parametrize("line", ["COPY secret.env ./", "COPY absent.txt ./", "COPY --chmod=600 notes.txt ./"])
def test_a_copy_that_a_build_would_refuse_or_do_otherwise_is_refused(project: Path, line: str) -> None:
    with pytest.raises(dockerfile.DockerfileError, match="line 2"):
        replay(project, f"FROM python:3.11 AS image\n{line}\n")


def test_a_stage_copies_from_another_and_only_what_that_one_made(project: Path) -> None:
    first = "FROM python:3.11 AS first\nWORKDIR /made\nCOPY notes.txt ./\nFROM python:3.11 AS image\n"
    root = replay(project, first + "COPY --from=first /made /opt/made\n")
    assert (root.folder / "opt/made/notes.txt").read_text() == "notes\n"
    with pytest.raises(dockerfile.DockerfileError, match="has made no /other"):
        steps.Replay(project, project.parent / "again", arguments={}, sidecar=None)._source("first", "/other", 1)


def test_a_command_runs_in_the_image_s_environment_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAILGUARD_API_KEYS", "a-key-of-this-machine")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    code = "import json, os; json.dump(dict(os.environ), open('environment.json', 'w'))"
    text = "FROM python:3.11 AS image\nARG WHERE=there\nENV CACHE=/var/cache/x\nWORKDIR /src\n"
    text += f'RUN OWN=1 python -c "{code}"\n'
    root = replay(project, text, arguments={"WHERE": "here", "UNUSED": "x"})
    found = json.loads((root.folder / "src/environment.json").read_text())
    assert {"SAILGUARD_API_KEYS", "PYTHONPATH", "UNUSED"}.isdisjoint(found)
    assert (found["OWN"], found["WHERE"], found["CACHE"]) == ("1", "here", f"{root.folder}/var/cache/x")
    assert found["HOME"].startswith(str(root.folder))
    assert found["PATH"].split(":")[0] == str(root.prefix / "bin")
    assert "WHERE" not in root.variables()  # an ARG is gone when the image runs


def test_pip_keeps_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".config/pip").mkdir(parents=True)
    (tmp_path / ".config/pip/pip.conf").write_text("[global]\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    found = steps.pip_variables()
    assert (found["PIP_FIND_LINKS"], found["PIP_CONFIG_FILE"]) == ("/wheels", str(tmp_path / ".config/pip/pip.conf"))


def test_a_mounted_file_is_there_for_its_command_only(project: Path) -> None:
    code = "import shutil; shutil.copy('/build/n.txt'.lstrip('/'), 'seen.txt')"
    mount = "--mount=type=bind,source=notes.txt,target=/build/n.txt"
    root = replay(project, f'FROM python:3.11 AS image\nRUN {mount} python -c "{code}"\n')
    assert (root.folder / "seen.txt").read_text() == "notes\n"
    assert not (root.folder / "build").exists()
    assert (project / "notes.txt").exists()


@pytest.mark.parametrize(
    "line", ["RUN make", "RUN curl https://example.org", "RUN rm -rf /opt", "RUN --network=none python -V"]
)
def test_an_unknown_command_is_an_error(project: Path, line: str) -> None:
    with pytest.raises(dockerfile.DockerfileError, match="line 2"):
        replay(project, f"FROM python:3.11 AS image\n{line}\n")


def test_a_step_that_fails_ends_the_replay_with_what_it_wrote(project: Path) -> None:
    with pytest.raises(steps.ReplayError, match="out of honey"):
        replay(project, "FROM python:3.11 AS image\nRUN python -c \"raise SystemExit('out of honey')\"\n")


def test_what_is_left_out_is_told(project: Path) -> None:
    command = "apt-get update && useradd bee && install -d -o 1 /var/lib/bee && rm -rf /var/lib/apt/lists/*"
    (project / "Dockerfile").write_text(f"FROM python:3.11 AS image\nRUN {command}\n")
    (project.parent / "work").mkdir()
    run = steps.Replay(project, project.parent / "work", arguments={}, sidecar=None)
    root = run.stage("image")
    assert [line.split()[0] for line in run.left_out] == ["apt-get", "useradd", "install", "rm"]
    assert (root.folder / "var/lib/bee").is_dir()


def test_a_given_model_stands_in_for_the_export(project: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir(mode=0o700)
    (model / "model.onnx").write_bytes(b"graph")
    text = "FROM python:3.11 AS full\nFROM full AS export\nRUN false\n"
    text += "FROM python:3.11 AS image\nCOPY --from=export /opt/m /opt/m\n"
    root = replay(project, text, sidecar=model)
    assert (root.folder / "opt/m/model.onnx").read_bytes() == b"graph"
    assert replay_image.unreadable(root) == []


def test_files_that_only_their_owner_can_read_are_found(tmp_path: Path) -> None:
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/closed").write_bytes(b"")
    (tmp_path / "opt/closed").chmod(0o600)
    assert replay_image.unreadable(steps.Root(folder=tmp_path)) == ["/opt/closed"]


def make_image(folder: Path, before: str = "") -> Any:
    """A root whose command is a tiny server that first runs `before`."""
    root = steps.Root(folder=folder, volumes=["/var/lib/x"], entrypoint=["serve"], environment={"HOME": "/var/lib/x"})
    root.health = ["python", "-c", "pass"]
    (root.prefix / "bin").mkdir(parents=True)
    (root.prefix / "bin/python").symlink_to(sys.executable)
    program = root.prefix / "bin/serve"
    program.write_text(f"#!{sys.executable}\n" + SERVER.format(before=before))
    program.chmod(0o755)
    return root


def test_the_command_is_started_asked_and_stopped(tmp_path: Path) -> None:
    root = make_image(tmp_path / "root", "pathlib.Path(os.environ['HOME'], 'audit').touch()")
    found = replay_image.serve(root, tmp_path / "log", 30)
    assert (found["model"], found["flagged"], found["writes_outside_volumes"]) == ("tiny", False, False)


def test_a_service_that_writes_outside_its_volumes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root/opt").mkdir(parents=True)
    root = make_image(tmp_path / "root", "pathlib.Path(os.environ['HOME'], '../../../opt/cache').touch()")
    with pytest.raises(steps.ReplayError, match=r"outside its volumes: opt/cache$"):
        replay_image.serve(root, tmp_path / "log", 30)


def test_a_service_that_ends_before_it_is_ready_is_told_with_its_log(tmp_path: Path) -> None:
    root = make_image(tmp_path / "root", "raise SystemExit('no such bank')")
    with pytest.raises(steps.ReplayError, match="no such bank"):
        replay_image.serve(root, tmp_path / "log", 30)


def test_a_service_that_fails_its_health_check_is_refused(tmp_path: Path) -> None:
    root = make_image(tmp_path / "root")
    root.health = ["python", "-c", "raise SystemExit(1)"]
    with pytest.raises(steps.ReplayError, match="ended with 1"):
        replay_image.serve(root, tmp_path / "log", 30)


@pytest.mark.slow
def test_an_interrupted_replay_leaves_nothing_behind(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    for name in ("replay-image", "image_steps.py", "dockerfile.py"):
        shutil.copy2(ROOT / "scripts" / name, project / "scripts")
    (project / ".dockerignore").write_text("*\n")
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready'); time.sleep(300)"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    (project / "Dockerfile").write_text(f'FROM python:{version} AS image\nRUN python -c "{code}"\n')
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = [sys.executable, "-B", str(project / "scripts/replay-image"), "image"]
    with subprocess.Popen(words, env=os.environ | {"TMPDIR": str(temporary)}, stderr=subprocess.PIPE) as run:
        try:
            deadline = time.monotonic() + 120
            while not (found := list(temporary.glob("*/image/ready"))):
                assert run.poll() is None, run.stderr.read() if run.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.05)
            child = int(found[0].read_text())
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130
        finally:
            run.kill()
    assert list(temporary.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
