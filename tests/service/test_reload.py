"""Hot reload: what is good comes into use between requests, what is bad is refused, and no request sees a mixture."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from feature_bank.bank import FEATURES, HEADS, MANIFEST, WEIGHTS
from feature_bank.errors import BankError
from feature_bank.versions import VersionStore
from guard.core import Guard
from guard.metrics import Metrics
from guard.serving import ServingGuard
from service.engine import EngineSlot, TransformersEngine
from service.reload import Reloader, ReloadResult
from service.settings import Settings
from service.watched import Looks, WatchedFiles, What
from tests.service.file_engine import PATIENCE, FileEngine, feature_policy, policy_text


class ModelThread:
    """The thread that engines are made on."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1)

    async def call(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        self._executor.shutdown()


class Site:
    """A bank and a policy on the disk, the engine that was started on them, and its reloader."""

    def __init__(self, bank: Path, policy: Path, thread: ModelThread, **settings: Any) -> None:
        self.bank, self.policy = bank, policy
        self.metrics = Metrics()
        self.first = FileEngine.start(bank, policy, self.metrics)
        self.world = self.first.world
        self.slot = EngineSlot(self.first)
        self.lines: list[dict[str, Any]] = []
        logger = structlog.wrap_logger(None, processors=[self._keep])
        chosen = Settings(bank=bank, policy=policy, **{"watch_seconds": 0.0, **settings})
        self.reloader = Reloader(self.slot, thread, chosen, self.metrics, logger)

    def _keep(self, _logger: Any, _name: str, event: dict[str, Any]) -> Any:
        self.lines.append(event)
        raise structlog.DropEvent

    def reload(self, what: What = "all") -> ReloadResult:
        return asyncio.run(self.reloader.reload(what, reason="test"))

    def count(self, what: str, result: str) -> float | None:
        return self.metrics.registry.get_sample_value("sailguard_reloads_total", {"what": what, "result": result})

    def behind(self, what: str) -> float | None:
        return self.metrics.registry.get_sample_value("sailguard_version_behind", {"what": what})

    def in_use(self) -> tuple[str, str]:
        assert self.slot.engine is not None
        return self.slot.engine.bank_version, self.slot.engine.policy_version


@pytest.fixture
def thread() -> Iterator[ModelThread]:
    thread = ModelThread()
    yield thread
    thread.close()


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text())
    return path


@pytest.fixture
def site(bank: Path, policy: Path, thread: ModelThread) -> Site:
    return Site(bank, policy, thread)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.005)


# ---- good and bad versions ---------------------------------------------------------------------------------------


def test_a_new_bank_takes_the_old_ones_place_and_the_policy_stays(site: Site, write_bank: Callable[..., Path]) -> None:
    old = site.in_use()
    write_bank(site.bank, explanation="written anew")
    site.policy.write_text(policy_text("not meant"))
    result = site.reload("bank")
    assert (result.result, result.problem, result.previous_bank) == ("ok", None, old[0])
    assert site.in_use() == (result.bank, old[1])
    assert result.bank != old[0]
    assert site.slot.engine is not None
    assert site.slot.engine.policy is site.first.policy
    assert (site.count("bank", "ok"), site.count("policy", "ok"), site.count("bank", "refused")) == (1, 0, 0)


def test_a_new_policy_takes_the_old_ones_place_and_the_bank_stays(site: Site) -> None:
    site.policy.write_text(policy_text("stricter", action="block"))
    shutil.rmtree(site.bank)
    result = site.reload("policy")
    assert (result.result, site.in_use()[0]) == ("ok", site.first.bank_version)
    assert site.in_use()[1].startswith("stricter+")
    assert not site.first.closed, "it shares its model with the one after it"
    info = {"name": "stricter", "version": site.in_use()[1], "on_error": "block"}
    assert site.metrics.registry.get_sample_value("sailguard_policy_info", info) == 1


def test_what_is_in_use_already_is_not_made_again(site: Site) -> None:
    for file in (*site.bank.iterdir(), site.policy):
        file.touch()
    assert [site.reload(what).result for what in ("bank", "policy", "all")] == ["unchanged"] * 3
    assert site.world.builds == 0
    assert site.slot.engine is site.first
    assert site.reloader.last == {}


@pytest.mark.parametrize("name", [MANIFEST, FEATURES, WEIGHTS, HEADS])
def test_a_bank_with_one_corrupted_byte_is_refused_and_the_old_one_serves_on(site: Site, name: str) -> None:
    data = bytearray((site.bank / name).read_bytes())
    data[len(data) // 2] ^= 1
    (site.bank / name).write_bytes(data)
    result = site.reload()
    assert result.result == "refused"
    assert result.problem is not None
    assert name in result.problem
    assert site.slot.engine is site.first
    assert site.world.builds == 0, "the model does not wait for a bank that does not verify"
    assert (site.count("bank", "refused"), site.count("policy", "refused")) == (1, 0)
    assert site.reloader.last["bank"] is result
    assert site.lines[-1]["problem"] == result.problem


def test_a_bank_of_another_model_is_refused(site: Site, write_bank: Callable[..., Path]) -> None:
    write_bank(site.bank, identity={"config_hash": "0" * 64})
    result = site.reload("bank")
    assert result.result == "refused"
    assert "another model" in str(result.problem)
    assert site.slot.engine is site.first


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (feature_policy("L1/7"), "'L1/7'"),
        ("name: [", "YAML"),
        ("name: x\nrules: []\nunknown: 1\n", "'unknown'"),
        ("", "mapping"),
    ],
)
def test_a_bad_policy_is_refused_and_says_why(site: Site, text: str, part: str) -> None:
    site.policy.write_text(text)
    result = site.reload()
    assert result.result == "refused"
    assert part in str(result.problem)
    assert str(site.policy) in str(result.problem)
    assert site.slot.engine is site.first
    assert (site.count("bank", "refused"), site.count("policy", "refused")) == (0, 1)


def test_missing_files_are_refused(site: Site) -> None:
    site.policy.unlink()
    assert site.reload("policy").result == "refused"
    shutil.rmtree(site.bank)
    assert site.reload("bank").result == "refused"
    assert site.slot.engine is site.first


def test_an_unexpected_failure_is_refused_without_its_text(site: Site) -> None:
    site.world.on_build = lambda: {}["secret"]
    site.policy.write_text(policy_text("new"))
    result = site.reload()
    assert result.result == "refused"
    assert str(result.problem).startswith("KeyError:")
    assert "secret" not in str(site.lines)
    assert site.slot.engine is site.first


def test_bank_and_policy_come_together_or_not_at_all(site: Site, write_bank: Callable[..., Path]) -> None:
    write_bank(site.bank, explanation="written anew")
    site.policy.write_text(feature_policy("L9/9"))
    assert site.reload("all").result == "refused"
    assert site.slot.engine is site.first
    site.policy.write_text(feature_policy("L1/1"))
    result = site.reload("all")
    assert result.result == "ok"
    assert (site.count("bank", "ok"), site.count("policy", "ok")) == (1, 1)


def test_an_engine_that_lost_the_part_that_was_to_stay_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch, write_bank: Callable[..., Path]
) -> None:
    write_bank(site.bank, explanation="written anew")
    made = FileEngine.reloaded
    other = site.policy.with_name("other.yaml")
    other.write_text(policy_text("other"))
    monkeypatch.setattr(FileEngine, "reloaded", lambda self, bank, policy: made(self, bank, policy or other))
    assert site.reload("bank").result == "refused"
    assert site.slot.engine is site.first


# ---- files in the middle of a write ------------------------------------------------------------------------------


class Written(WatchedFiles):
    """Files that somebody writes in place: one step further each time they are looked at."""

    steps: list[Callable[[], object]]

    def look(self, what: What) -> Looks:
        if self.steps:
            self.steps.pop(0)()
        return super().look(what)


def test_a_policy_that_is_being_written_is_not_read_half(site: Site) -> None:
    whole = policy_text("whole") + yaml_rules(20)
    pieces = [whole[:end] for end in range(len(policy_text("whole")), len(whole), 97)] + [whole]
    files = Written(site.bank, site.policy)
    files.steps = [lambda piece=piece: site.policy.write_text(piece) for piece in pieces]  # type: ignore[misc]
    site.reloader.files = files
    result = site.reload()
    assert not files.steps
    assert result.result == "ok"
    assert site.world.builds == 1
    assert site.slot.engine is not None
    assert len(site.slot.engine.policy.rules) == 21


def test_a_bank_that_is_copied_in_place_is_not_read_half(
    site: Site, write_bank: Callable[..., Path], tmp_path: Path
) -> None:
    new = write_bank(tmp_path / "new", explanation="written anew")
    names = (MANIFEST, FEATURES, HEADS, WEIGHTS)
    files = Written(site.bank, site.policy)
    files.steps = [lambda name=name: shutil.copyfile(new / name, site.bank / name) for name in names]  # type: ignore[misc]
    site.reloader.files = files
    assert site.reload().result == "ok"
    assert site.world.builds == 1


def test_files_that_change_while_they_are_read_are_refused(site: Site) -> None:
    site.policy.write_text(policy_text("first"))
    site.world.on_build = lambda: os.utime(site.policy, ns=(1, 1))
    result = site.reload()
    assert result.result == "refused"
    assert "changed" in str(result.problem)
    assert site.slot.engine is site.first
    site.world.on_build = lambda: None
    assert site.reload().result == "ok"


def yaml_rules(count: int) -> str:
    """Further rules for the end of a policy file: a file that is cut between two of them is a policy, too."""
    line = "- {{domain: terror, threshold: {{probability: 0.9}}, action: flag, name: rule-{}}}\n"
    return "".join(line.format(number) for number in range(count))


# ---- one at a time -----------------------------------------------------------------------------------------------


def test_reloads_at_the_same_time_come_one_after_another(site: Site) -> None:
    async def run() -> list[str]:
        site.policy.write_text(policy_text("new"))
        results = await asyncio.gather(*(site.reloader.reload("all", reason=str(i)) for i in range(6)))
        return sorted(result.result for result in results)

    assert asyncio.run(run()) == ["ok"] + ["unchanged"] * 5
    assert (site.world.builds, site.world.most_building) == (1, 1)


def test_a_reload_goes_to_its_end_though_nobody_waits_for_it(site: Site) -> None:
    async def run() -> None:
        site.policy.write_text(policy_text("new"))
        task = asyncio.create_task(site.reloader.reload("all", reason="test"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await site.reloader.reload("all", reason="behind it")

    asyncio.run(run())
    assert site.in_use()[1].startswith("new+")
    assert site.world.builds == 1


def test_nothing_is_taken_into_use_after_the_end(site: Site) -> None:
    async def run() -> ReloadResult:
        site.policy.write_text(policy_text("new"))
        task = asyncio.create_task(site.reloader.reload("all", reason="test"))
        await asyncio.sleep(0)
        await site.reloader.close()
        assert task.done() or (await asyncio.wait([task]))
        return task.result()

    assert asyncio.run(run()).result == "refused"
    assert site.slot.engine is site.first


def test_without_a_guard_there_is_nothing_to_reload(site: Site) -> None:
    site.slot.fail("still loading")
    result = site.reload()
    assert (result.result, result.bank) == ("refused", None)
    assert "still loading" in str(result.problem)


def test_a_failed_commit_leaves_the_old_engine(site: Site) -> None:
    def commit() -> None:
        raise PermissionError(13, "Permission denied", "current")

    def run() -> Awaitable[ReloadResult]:
        return site.reloader.exchange("policy", lambda old: old.reloaded(None, None), commit, reason="test")

    async def wait() -> ReloadResult:
        return await run()

    result = asyncio.run(wait())
    assert result.result == "refused"
    assert "Permission denied" in str(result.problem)
    assert site.slot.engine is site.first


# ---- following files and signals ---------------------------------------------------------------------------------


class Counted(WatchedFiles):
    looks = 0

    def look(self, what: What) -> Looks:
        self.looks += 1
        return super().look(what)


def watching(site: Site, story: Callable[[Counted], Awaitable[None]]) -> None:
    async def run() -> None:
        files = site.reloader.files = Counted(site.bank, site.policy)
        site.reloader.start()
        try:
            await story(files)
        finally:
            await site.reloader.close()

    asyncio.run(run())


@pytest.fixture
def watched(bank: Path, policy: Path, thread: ModelThread) -> Site:
    return Site(bank, policy, thread, watch_seconds=0.01)


def test_the_metrics_say_while_the_files_hold_what_is_not_in_use(watched: Site) -> None:
    bad, good = feature_policy("L9/9"), feature_policy("L1/1")

    async def story(counted: Counted) -> None:
        watched.policy.write_text(bad)
        await until(lambda: watched.count("policy", "refused") == 1)
        assert (watched.behind("policy"), watched.behind("bank")) == (1, 0)

        def refuse(_: Any) -> Any:
            raise BankError("it cannot be used")

        # What was only tried changed no file.
        result = await watched.reloader.exchange("bank", refuse, lambda: None, reason="test")
        assert (result.result, watched.behind("bank")) == ("refused", 0)
        await watched.reloader.reload("all", reason="test")  # the one that is to blame, and it alone
        assert (watched.behind("policy"), watched.behind("bank")) == (1, 0)
        watched.policy.write_text(good)
        await until(lambda: watched.slot.engine is not watched.first)
        await until(lambda: watched.behind("policy") == 0)

    watching(watched, story)


def test_one_at_a_time_has_its_turn_to_load(site: Site, thread: ModelThread) -> None:

    held: list[str] = []

    @contextlib.asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        held.append("taken")
        yield
        held.append("given")

    site.world.on_build = lambda: held.append("built")
    chosen = Settings(bank=site.bank, policy=site.policy, watch_seconds=0.0)
    reloader = Reloader(site.slot, thread, chosen, site.metrics, site.reloader.logger, turn=turn)
    site.policy.write_text(policy_text("stricter", action="block"))
    assert asyncio.run(reloader.reload("policy", reason="test")).result == "ok"
    assert held == ["taken", "built", "given"]


def test_a_changed_file_is_followed_and_a_refused_one_not_tried_again(watched: Site) -> None:
    async def story(files: Counted) -> None:
        watched.policy.write_text(feature_policy("L9/9"))
        await until(lambda: watched.count("policy", "refused") == 1)
        seen = files.looks
        await until(lambda: files.looks > seen + 10)
        assert watched.count("policy", "refused") == 1
        assert watched.slot.engine is watched.first
        watched.policy.write_text(feature_policy("L1/1"))
        await until(lambda: watched.slot.engine is not watched.first)

    watching(watched, story)
    assert watched.in_use()[1].startswith("featured+")
    assert (watched.count("policy", "ok"), watched.count("policy", "refused")) == (1, 1)


def test_a_refused_policy_is_taken_with_the_bank_that_it_waited_for(
    watched: Site, write_bank: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FileEngine.reloaded

    def reloaded(self: FileEngine, bank: Path | None, policy: Path | None) -> FileEngine:
        new = plain(self, bank, policy)
        if new.policy.name == "for the new one" and "anew" not in new.bank.features[1].explanation:
            raise ValueError("this policy is for the new bank")
        return new

    monkeypatch.setattr(FileEngine, "reloaded", reloaded)

    async def story(files: Counted) -> None:
        watched.policy.write_text(policy_text("for the new one"))
        await until(lambda: watched.count("policy", "refused") == 1)
        write_bank(watched.bank, explanation="written anew")
        await until(lambda: watched.count("bank", "ok") == 1)

    watching(watched, story)
    assert watched.in_use()[1].startswith("for the new one+")


def test_a_new_bank_comes_though_an_earlier_policy_is_still_refused(
    watched: Site, write_bank: Callable[..., Path]
) -> None:
    async def story(files: Counted) -> None:
        watched.policy.write_text("name: [")
        await until(lambda: watched.count("policy", "refused") == 1)
        write_bank(watched.bank, explanation="written anew")
        await until(lambda: watched.count("bank", "ok") == 1)

    watching(watched, story)
    assert watched.in_use()[1] == watched.first.policy_version


def test_the_current_version_of_a_store_is_followed(
    bank: Path, policy: Path, tmp_path: Path, write_bank: Callable[..., Path], thread: ModelThread
) -> None:
    store = VersionStore(tmp_path / "store")
    first = store.promote(bank).version
    site = Site(store.folder, policy, thread, watch_seconds=0.01)
    other = write_bank(tmp_path / "other", explanation="written anew")

    async def story(files: Counted) -> None:
        second = store.promote(other).version
        await until(lambda: site.in_use()[0] == second)
        store.rollback()
        await until(lambda: site.in_use()[0] == first)

    watching(site, story)
    assert site.count("bank", "ok") == 2


def test_what_a_policy_extends_is_followed_too(bank: Path, policy: Path, thread: ModelThread) -> None:
    base = policy.with_name("base.yaml")
    base.write_text(policy_text("base"))
    policy.write_text("name: mine\nextends: base.yaml\n")
    site = Site(bank, policy, thread, watch_seconds=0.01)

    async def story(files: Counted) -> None:
        base.write_text(policy_text("base", action="block"))
        await until(lambda: site.slot.engine is not site.first)

    watching(site, story)
    assert site.slot.engine is not None
    assert site.slot.engine.policy.rules[0].action == "block"


def test_a_hangup_signal_reloads_all(site: Site, write_bank: Callable[..., Path]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert site.reloader.install_sighup(loop)
        try:
            write_bank(site.bank, explanation="written anew")
            site.policy.write_text(policy_text("new"))
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: site.count("policy", "ok") == 1)
        finally:
            await site.reloader.close()
        assert not loop.remove_signal_handler(signal.SIGHUP)

    asyncio.run(run())
    assert (site.count("bank", "ok"), site.count("policy", "ok")) == (1, 1)


def test_elsewhere_than_on_the_main_thread_there_are_no_signals(site: Site, thread: ModelThread) -> None:
    async def run() -> bool:
        return site.reloader.install_sighup(asyncio.get_running_loop())

    with ThreadPoolExecutor(max_workers=1) as executor:
        assert executor.submit(lambda: asyncio.run(run())).result() is False


# ---- requests under way ------------------------------------------------------------------------------------------


async def moderate(client: httpx.AsyncClient, *texts: str) -> set[tuple[str, ...]]:
    """The (bank, policy) that a response names anywhere: in its block, and in the features of every verdict."""
    response = await client.post("/v1/moderations", json={"input": list(texts)})
    assert response.status_code == 200
    body = response.json()
    hits = [hit for result in body["results"] for hit in result["sailguard"]["violence"]["features"]]
    assert len(hits) == len(texts)
    return {(body["sailguard"]["bank"], body["sailguard"]["policy"]), *(tuple(h["explanation"].split()) for h in hits)}


def serving(app: Any, story: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://testserver", timeout=30) as client,
        ):
            await story(client)

    asyncio.run(run())


def test_a_request_under_way_finishes_on_what_it_started_with(
    bank: Path, policy: Path, make_app: Callable[..., Any], write_bank: Callable[..., Path]
) -> None:
    app = make_app(lambda metrics: FileEngine.start(bank, policy, metrics), bank=bank, policy=policy)
    slot, reloader = app.state.services.slot, app.state.services.reloader

    async def story(client: httpx.AsyncClient) -> None:
        await until(lambda: slot.engine is not None)
        world, kept = slot.engine.world, weakref.ref(slot.engine)
        old = (slot.engine.bank_version, slot.engine.policy_version)
        # More texts than one batch holds: the later ones are judged when the new engine is in place.
        under_way = asyncio.create_task(moderate(client, "WAIT", *["a bird"] * 100))
        await until(world.waiting.is_set)
        write_bank(bank, explanation="written anew")
        policy.write_text(policy_text("new"))
        reload = asyncio.create_task(reloader.reload("all", reason="test"))
        await asyncio.sleep(0.3)  # for it to wait behind the batch; if it has not come so far, it comes later
        world.go.set()
        assert (await reload).result == "ok"
        new = (slot.engine.bank_version, slot.engine.policy_version)
        assert await under_way == {old}
        assert await moderate(client, "a bird") == {new}
        assert new[0] != old[0]
        assert new[1] != old[1]
        gc.collect()
        assert kept() is None, "the old engine is gone with the last request that used it"

    serving(app, story)


def test_no_answer_mixes_versions_however_often_they_change(
    site: Site, make_app: Callable[..., Any], write_bank: Callable[..., Path], tmp_path: Path
) -> None:
    app = make_app(site.first, bank=site.bank, policy=site.policy, max_queue=100)
    pairs = [site.in_use()]
    folders = [shutil.copytree(site.bank, tmp_path / "even"), write_bank(tmp_path / "odd", explanation="odd")]

    async def story(client: httpx.AsyncClient) -> None:
        done = asyncio.Event()
        answers: list[set[tuple[str, ...]]] = []

        async def ask() -> None:
            while not done.is_set():
                answers.append(await moderate(client, *["a bird"] * 40))

        askers = [asyncio.create_task(ask()) for _ in range(4)]
        services = app.state.services
        for number in range(1, 6):
            for name in (MANIFEST, FEATURES, WEIGHTS, HEADS):
                shutil.copyfile(folders[number % 2] / name, site.bank / name)
            site.policy.write_text(policy_text(f"number{number}"))
            assert (await services.reloader.reload("all", reason="test")).result == "ok"
            pairs.append((services.slot.engine.bank_version, services.slot.engine.policy_version))
            answered = len(answers)
            await until(lambda answered=answered: len(answers) > answered + 4)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*askers)
        assert all(len(answer) == 1 for answer in answers)
        assert set().union(*answers) == set(pairs)

    serving(app, story)


# ---- a real guard on the tiny model ------------------------------------------------------------------------------

KEY = "an-admin-key-for-tests"
CHAT = "/v1/chat/completions"


@pytest.fixture
def guarded(bank: Path, policy: Path, tiny_model: Any, tiny_tokenizer: Any) -> Iterator[TransformersEngine]:
    guard = Guard.from_bank(bank, policy=policy, metrics=Metrics())
    engine = TransformersEngine(ServingGuard(guard, tiny_model, tiny_tokenizer), "tiny-llama")
    yield engine
    engine.close()


def test_a_stream_under_way_ends_under_the_policy_it_began_with(
    guarded: TransformersEngine,
    bank: Path,
    policy: Path,
    serve: Callable[..., str],
    read_events: Callable[[str], list[Any]],
    write_bank: Callable[..., Path],
) -> None:
    url = serve(guarded, bank=bank, policy=policy, admin_keys=KEY)
    body = {"model": "sailguard", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    old = (guarded.bank_version, guarded.policy_version)
    with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
        with client.stream("POST", CHAT, json={**body, "stream": True, "max_tokens": 300}) as response:
            lines = response.iter_lines()
            text = next(lines)
            write_bank(bank, explanation="written anew")
            policy.write_text(policy_text("stricter", action="block"))
            assert client.post("/admin/bank/reload").json()["result"] == "ok"
            result = client.post("/admin/policy/reload").json()
            assert result["result"] == "ok"
            text += "\n" + "\n".join(lines)
        events = read_events(text)
        assert events[-1] == "[DONE]"
        blocks = [event["sailguard"] for event in events[:-1] if event.get("sailguard")]
        assert blocks
        assert {(block["bank"], block["policy"]) for block in blocks} == {old}
        verdicts = [verdict for block in blocks for verdict in block["verdicts"]]
        assert {(v["bank_version"], v["policy_version"], v["action"]) for v in verdicts} == {(*old, "flag")}
        choice = client.post(CHAT, json={**body, "max_tokens": 20}).json()
    assert choice["choices"][0]["finish_reason"] == "content_filter"
    assert (choice["sailguard"]["bank"], choice["sailguard"]["policy"]) == (result["bank"], result["policy"])
    assert result["bank"] != old[0]


@pytest.mark.parametrize("harm", ["model", "canary", "feature", "byte"])
def test_what_does_not_fit_the_running_model_is_refused(
    guarded: TransformersEngine,
    bank: Path,
    policy: Path,
    thread: ModelThread,
    write_bank: Callable[..., Path],
    harm: str,
) -> None:
    slot = EngineSlot(guarded)
    settings = Settings(bank=bank, policy=policy, watch_seconds=0.0)
    logger = structlog.wrap_logger(structlog.ReturnLogger())
    reloader = Reloader(slot, thread, settings, guarded.metrics, logger)
    before = guarded.score(["hello"], ["prompt"])
    if harm == "model":
        write_bank(bank, identity={"config_hash": "0" * 64})
    elif harm == "canary":
        write_bank(bank, canary=2.0)
    elif harm == "feature":
        policy.write_text(feature_policy("L3/3"))
    else:
        data = bytearray((bank / WEIGHTS).read_bytes())
        data[-1] ^= 1
        (bank / WEIGHTS).write_bytes(data)
    result = asyncio.run(reloader.reload("all", reason="test"))
    assert result.result == "refused", result
    assert slot.engine is guarded
    assert guarded.score(["hello"], ["prompt"]) == before
    value = guarded.metrics.registry.get_sample_value
    policy_in_use = {"name": guarded.policy.name, "version": guarded.policy_version, "on_error": "block"}
    assert value("sailguard_policy_info", policy_in_use) == 1
