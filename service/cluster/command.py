"""`sailguard serve --cluster`: start the application on a cluster, and take it down at the end."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from feature_bank.ray_cluster import connect, import_ray
from service.cluster.application import DEPLOYMENT, make_application
from service.errors import SettingsError

if TYPE_CHECKING:
    from service.settings import Settings

__all__ = ["APPLICATION", "serve_on_cluster", "start_serve"]

APPLICATION = "sailguard"


def serve_on_cluster(
    settings: Settings, cluster: str, *, replicas: int, max_replicas: int | None, say: Callable[[str], None]
) -> None:
    """Serve on a Ray cluster until SIGTERM or SIGINT; what is under way then is answered.

    cluster: as `feature_bank.ray_cluster.connect` takes it. say: told what is waited for, and the address. Belongs on
    the main thread. Serve itself is started if the cluster has none, and ended unless others use it by then; one
    that is there is joined, and keeps the address that it has.

    Raises DataError if Ray is not installed or the cluster not reached, SettingsError for settings that cannot be used,
    an address that is taken, or replicas that do not come up, with their reason.
    """
    from service.cluster.controller import is_running, served_at
    from service.worker import plain_values

    application = make_application(settings, replicas=replicas, max_replicas=max_replicas)
    with connect(cluster, "serve"), _stopping() as stop:
        serve: Any = import_ray("serve").serve
        ours = not is_running()
        try:
            start_serve(settings)
            host, port = served_at()
            type(settings)(**{**plain_values(settings), "host": host, "port": port})  # no keys, no other machines
            if APPLICATION in serve.status().applications:
                raise SettingsError(
                    f"the cluster serves an application {APPLICATION!r} already: end the command that serves it, or if "
                    "that was killed run `serve shutdown`; one of `serve deploy` is updated by it (docs/scale.md)"
                )
            try:
                _say_room(say, replicas, settings.threads or 1)
                _run(serve, application)
                shown = f"[{host}]" if ":" in host else host
                where = "on every machine of the cluster that has a replica"
                say(f"sailguard serves http://{shown}:{port} {where} (Ctrl-C ends)")
                stop.wait()
            finally:
                serve.delete(APPLICATION)
        finally:
            if ours and _is_idle(serve):
                serve.shutdown()


def start_serve(settings: Settings) -> None:
    """Have the connected cluster's Serve listen where the settings say; one that runs already keeps its address.

    Raises SettingsError if the address is taken.
    """
    serve: Any = import_ray("serve").serve
    port = settings.port or _free_port(settings.host)
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": settings.host.strip("[]"), "port": port},
            logging_config={"enable_access_log": False},
        )
    except Exception as error:
        raise SettingsError(
            f"Ray Serve could not listen on {settings.host}, port {port} ({_last_words(str(error))}); choose another "
            "--host or --port"
        ) from error


def _run(serve: Any, application: Any) -> None:
    """Return once all replicas serve."""
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except (RuntimeError, serve.exceptions.RayServeException) as error:
        found = serve.status().applications.get(APPLICATION)
        said = found.deployments[DEPLOYMENT].message if found is not None and DEPLOYMENT in found.deployments else ""
        raise SettingsError(f"the replicas do not come up: {_last_words(said or str(error))}") from error


def _is_idle(serve: Any) -> bool:
    """Whether Serve has no application, or none that can be asked for: others may have deployed theirs meanwhile."""
    try:
        return not serve.status().applications.keys() - {APPLICATION}
    except Exception:  # noqa: BLE001 - Serve is gone or broken, and was started here
        return True


def _last_words(text: str) -> str:
    """What Ray's traceback ends with: the error of the process that failed."""
    return " ".join(text.rpartition("RuntimeError: ")[2].split())[-600:]


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        return int(probe.getsockname()[1])


def _say_room(say: Callable[[str], None], replicas: int, cpus: int) -> None:
    """Say so if the replicas have to wait for machines: nothing else would."""
    free = int(import_ray().available_resources().get("CPU", 0))
    if free < replicas * cpus:
        say(f"{replicas} replicas want {replicas * cpus} CPUs, and the cluster has {free} free: waiting for more")


class _Stop:
    """What a signal does: before `wait` it interrupts, and within it ends the waiting, so that answers are finished."""

    def __init__(self) -> None:
        self._waiting = False
        self._asked = threading.Event()

    def wait(self) -> None:
        """Return after SIGTERM or SIGINT. One more interrupts."""
        self._waiting = True
        self._asked.wait()

    def note(self, *_: object) -> None:
        """Handle a signal."""
        if not self._waiting or self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()


@contextlib.contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
