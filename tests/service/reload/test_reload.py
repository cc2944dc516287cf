"""What is good comes into use, what is bad or half written is refused, and reloads come one after another."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from feature_bank.bank import FEATURES, HEADS, MANIFEST, WEIGHTS
from service.reload import ReloadResult
from service.watched import Looks, WatchedFiles, What
from tests.service.file_engine import FileEngine, feature_policy, policy_text
from tests.service.reload.conftest import Site


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
