"""Reloads while requests are under way: each is judged by one version, and a real guard refuses what does not fit."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from feature_bank.bank import FEATURES, HEADS, MANIFEST, WEIGHTS
from guard.core import Guard
from guard.metrics import Metrics
from guard.serving import ServingGuard
from service.engine import EngineSlot, TransformersEngine
from service.reload import Reloader
from service.settings import Settings
from tests.service.file_engine import FileEngine, feature_policy, policy_text
from tests.service.reload.conftest import ModelThread, Site, until


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
