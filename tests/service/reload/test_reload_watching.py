"""Files that are followed, and the signal that asks for a reload."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from feature_bank.errors import BankError
from feature_bank.versions import VersionStore
from service.reload import Reloader
from service.settings import Settings
from service.watched import Looks, WatchedFiles, What
from tests.service.file_engine import FileEngine, feature_policy, policy_text
from tests.service.reload.conftest import ModelThread, Site, until


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
