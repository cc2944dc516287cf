"""Hot reload: a new version of the bank or the policy takes the old one's place between two requests.

A new engine is made beside the one that serves, on the model thread, and takes its place in the slot only if all went
well. A request keeps the engine that it took from the slot at its start, so it never sees two versions. An engine that
was replaced is not closed, for it shares its model with the next one: it is gone once the last request lets go of it.
"""

from __future__ import annotations

import asyncio
import signal
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from feature_bank.bank import Bank, shipped_bank_path
from feature_bank.errors import BankError, SailguardError
from feature_bank.verdicts import write_moment
from guard.errors import CanaryError, PolicyError
from guard.policy import Policy
from service.watched import Looks, Part, WatchedFiles, What, parts_of

if TYPE_CHECKING:
    from guard.metrics import Metrics
    from service.engine import EngineSlot, ServedEngine
    from service.settings import Settings

__all__ = ["Part", "ReloadError", "ReloadResult", "Reloader", "What"]

T = TypeVar("T")
Build = Callable[["ServedEngine"], "ServedEngine"]
"""Makes the new engine out of the one that serves; runs on the model thread."""


class ReloadError(SailguardError):
    """A new version cannot be taken into use, though nothing is wrong with its contents."""


class ModelThread(Protocol):
    """Where engines are made."""

    async def call(self, function: Callable[[], T], /) -> T:
        """Run `function` on the model thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadResult:
    """What came of one reload."""

    what: What
    result: Literal["ok", "refused", "unchanged"]
    reason: str
    """What it was asked for by."""
    bank: str | None
    """Version in use afterwards; none while there is no guard."""
    policy: str | None
    previous_bank: str | None
    previous_policy: str | None
    problem: str | None
    """Why it was refused."""
    time: str

    def to_dict(self) -> dict[str, Any]:
        """The result, JSON-ready."""
        return asdict(self)


class Reloader:
    """Puts new versions into the slot: when asked to, on SIGHUP, and when the files change.

    The bank and the policy are those of the settings; `bank` is for an engine that has its bank elsewhere; `turn` is
    held while a new version is loaded. Call `start` before the first engine is loaded, so that no change is missed. All
    of it belongs to the event loop's thread.
    """

    def __init__(
        self,
        slot: EngineSlot,
        runner: ModelThread,
        settings: Settings,
        metrics: Metrics,
        logger: Any,
        *,
        bank: Path | None = None,
        turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        self.logger = logger
        self.files = WatchedFiles(bank or settings.bank or shipped_bank_path(), settings.policy)
        self.last: dict[Part, ReloadResult] = {}
        """The last reload of each part that changed something or was refused."""
        self._slot = slot
        self._runner = runner
        self._metrics = metrics
        self._turn = turn
        self._watch_seconds = settings.watch_seconds
        self._lock = asyncio.Lock()
        self._seen: Looks = {}
        self._refused: set[Part] = set()
        self._unused: set[Part] = set()  # whose files hold, as they were last read, what cannot be used
        self._tasks: set[asyncio.Task[Any]] = set()
        self._signalled = 0
        self._watcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    # ---- what the server does with it --------------------------------------------------------------------

    def start(self) -> None:
        """Note how the files are, and watch them from now on."""
        self._seen = self.files.look("all")
        if self._watch_seconds > 0:
            self._watcher = asyncio.create_task(self._watch())

    def install_sighup(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Reload all on SIGHUP. Returns whether that is possible here: only on the process's main thread it is."""
        try:
            loop.add_signal_handler(signal.SIGHUP, self._on_sighup)
        except (NotImplementedError, RuntimeError, ValueError):
            return False
        self._loop = loop
        return True

    async def close(self) -> None:
        """Watch no more, take nothing into use any more, and wait for the reload that is under way."""
        self._closed = True
        if self._loop is not None:
            self._loop.remove_signal_handler(signal.SIGHUP)
            self._loop = None
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ---- what may be asked of it -------------------------------------------------------------------------

    async def reload(self, what: What, *, reason: str) -> ReloadResult:
        """Take what lies there now into use, if it is new and good. The part that is not meant stays as it is."""

        async def build(engine: ServedEngine) -> ServedEngine | None:
            looks = await self.files.settled(what)
            try:
                return await self._load(engine, what, looks)
            finally:
                self._seen.update(looks)

        return await self._to_its_end(self._exchange(what, build, None, reason))

    async def exchange(self, what: Part, build: Build, commit: Callable[[], object], *, reason: str) -> ReloadResult:
        """Try the engine that `build` makes; if it can be used, do `commit` and take it into use.

        commit: switches the link or writes the file, in a thread; if it raises, the old engine stays.
        """

        async def made(engine: ServedEngine) -> ServedEngine:
            return await self._runner.call(lambda: build(engine))

        return await self._to_its_end(self._exchange(what, made, commit, reason))

    async def try_out(self, build: Build) -> ServedEngine:
        """The engine that `build` makes, which is not taken into use; it goes with its last reader.

        Raises what `build` raises, and ReloadError while there is no guard.
        """
        return await self._to_its_end(self._try_out(build))

    # ---- exchanging --------------------------------------------------------------------------------------

    async def _exchange(
        self,
        what: What,
        build: Callable[[ServedEngine], Awaitable[ServedEngine | None]],
        commit: Callable[[], object] | None,
        reason: str,
    ) -> ReloadResult:
        async with self._lock, self._turn():
            old = self._slot.engine
            new: ServedEngine | None = None
            problem: str | None = None
            blamed: Sequence[Part] = ()
            try:
                new = await build(self._current())
                self._current()  # while it was made, the server may have begun to shut down
                if new is not None and commit is not None:
                    await asyncio.to_thread(commit)
                    self._current()
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a new version, the old one keeps serving
                problem = self._describe(error)
                blamed = _blamed(what, error)
                for part in blamed:
                    self._metrics.count_reload(part, "refused")
            else:
                if new is not None:
                    self._slot.fill(new)
            if problem is None:
                self._unused.difference_update(parts_of(what))
            elif commit is None:  # or nothing was written, and the files are what they were
                self._unused.update(blamed)
            self._publish()
            self._show_behind()
            return self._conclude(what, reason, old, new, problem)

    async def _try_out(self, build: Build) -> ServedEngine:
        async with self._lock:
            engine = self._current()
            try:
                return await self._runner.call(lambda: build(engine))
            finally:
                self._publish()

    def _current(self) -> ServedEngine:
        if self._closed or self._slot.engine is None:
            raise ReloadError(f"there is no guard to be exchanged: {self._slot.reason}")
        return self._slot.engine

    async def _load(self, old: ServedEngine, what: What, looks: Looks) -> ServedEngine | None:
        """A new engine of what lies there; None if that is what is in use already."""
        folder = self.files.bank_folder() if "bank" in looks else None
        file = self.files.policy if "policy" in looks else None
        # Read here first, so that the model need not wait for a bad version to be refused.
        bank = old.bank_version if folder is None else (await asyncio.to_thread(Bank.load, folder)).version
        policy = old.policy_version if file is None else (await asyncio.to_thread(Policy.load, file)).version
        if (bank, policy) == (old.bank_version, old.policy_version):
            return None
        new_folder = None if bank == old.bank_version else folder
        new_file = None if policy == old.policy_version else file
        new = await self._runner.call(lambda: old.reloaded(new_folder, new_file))
        if (new.bank_version, new.policy_version) != (bank, policy):
            made = f"{new.bank_version} with {new.policy_version}"
            raise ReloadError(f"{bank} with {policy} was to be used, but {made} came of it; try again")
        if looks != await asyncio.to_thread(self.files.look, what):
            raise ReloadError("the files were changed while they were read; try again once they are complete")
        return new

    def _conclude(
        self, what: What, reason: str, old: ServedEngine | None, new: ServedEngine | None, problem: str | None
    ) -> ReloadResult:
        now = self._slot.engine
        result = ReloadResult(
            what=what,
            result="refused" if problem is not None else "unchanged" if new is None else "ok",
            reason=reason,
            bank=None if now is None else now.bank_version,
            policy=None if now is None else now.policy_version,
            previous_bank=None if old is None else old.bank_version,
            previous_policy=None if old is None else old.policy_version,
            problem=problem,
            time=write_moment(datetime.now(UTC)),
        )
        for part in parts_of(what):
            if result.result != "unchanged" or part in self._refused:
                self.last[part] = result
            if problem is None:
                self._refused.discard(part)
            else:
                self._refused.add(part)
        if result.result == "ok":
            if result.bank != result.previous_bank:
                self._metrics.count_reload("bank", "ok")
            if result.policy != result.previous_policy:
                self._metrics.count_reload("policy", "ok")
        log = self.logger.info if problem is None else self.logger.error
        log("reload", **result.to_dict())
        return result

    def _describe(self, error: Exception) -> str:
        if isinstance(error, SailguardError | OSError):
            return f"{type(error).__name__}: {error}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        self.logger.error("reload failed", error=type(error).__name__, where=f"{place.filename}:{place.lineno}")
        return f"{type(error).__name__}: it could not be taken into use; the server's log says where it failed"

    def _publish(self) -> None:
        """Show in the metrics what is in use: an engine that was only tried has shown itself there."""
        engine = self._slot.engine
        if engine is not None:
            manifest, policy = engine.bank.manifest, engine.policy
            self._metrics.set_bank(
                name=manifest.name,
                version=manifest.version,
                model=manifest.model.id,
                content_hash=engine.bank.content_hash[:12],
            )
            self._metrics.set_policy(name=policy.name, version=policy.version, on_error=policy.on_error)

    def _show_behind(self, changed: Sequence[Part] = ()) -> None:
        """Show in the metrics whether what lies there is in use. changed: parts that were not read again yet."""
        for part in parts_of("all"):
            self._metrics.set_behind(part, part in self._unused or part in changed)

    async def _to_its_end(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work to its end, even if who asked for it is gone."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    # ---- following the files -----------------------------------------------------------------------------

    def _on_sighup(self) -> None:
        # One reload may have read the files already; the next one sees whatever came after that.
        if self._signalled < 2 and not self._closed:
            self._signalled += 1
            task = asyncio.create_task(self.reload("all", reason="SIGHUP"))
            self._tasks.add(task)
            task.add_done_callback(self._after_sighup)

    def _after_sighup(self, task: asyncio.Task[ReloadResult]) -> None:
        self._signalled -= 1
        self._tasks.discard(task)

    async def _watch(self) -> None:
        """Reload what has changed, once it stays the same for one round: a file may be in the middle of a write."""
        before: Looks = {}
        while True:
            await asyncio.sleep(self._watch_seconds)
            if self._slot.engine is None:
                continue
            found = await asyncio.to_thread(self.files.look, "all")
            changed = [part for part in found if found[part] != self._seen.get(part)]
            if changed and found == before:
                await self._follow(changed)
            else:
                self._show_behind(changed)
            before = found

    async def _follow(self, changed: Sequence[Part]) -> None:
        reason = "files changed"
        # What was refused before may go together with what has come now.
        if len(changed) == 2 or self._refused.difference(changed):
            result = await self.reload("all", reason=reason)
            if len(changed) == 2 or result.result != "refused":
                return
        await self.reload(changed[0], reason=reason)


def _blamed(what: What, error: Exception) -> Sequence[Part]:
    """The parts of `what` that were refused with `error`."""
    if what == "all" and isinstance(error, BankError | CanaryError):
        return ("bank",)
    if what == "all" and isinstance(error, PolicyError):
        return ("policy",)
    return parts_of(what)
