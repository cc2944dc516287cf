"""Settings of the server: keyword arguments first, then environment variables named `SAILGUARD_*`."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.auth import KeyRing
from service.errors import SettingsError
from service.key_file import KeyFile
from service.limits import parse_rate

__all__ = ["Settings", "is_loopback"]

_PREFIX = "SAILGUARD_"
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
_ORIGIN = re.compile(r"https?://([a-z0-9]([a-z0-9._-]{0,252})|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


class Settings(BaseSettings):
    """What the server needs to start. Raises `SettingsError` naming the setting that is wrong.

    A host that other machines can reach is refused unless API keys are set.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs API keys."""
    port: int = Field(default=8801, ge=0, le=65535)
    """TCP port; 0 lets the system choose."""
    model: str | None = None
    """Model name, folder or hub id; none means the embedded model."""
    bank: Path | None = None
    """Folder of the feature bank; none, or `shipped`, means the bank shipped for the embedded model."""
    policy: Path | None = None
    """Policy file (YAML); none means the default policy."""
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024)
    """Largest request body in bytes, refused with 413 before it is parsed."""
    max_input_tokens: int = Field(default=32768, ge=64)
    """Most tokens of one text that are judged; of a longer one the rest is left out, and the answer says so."""
    max_concurrent: int = Field(default=8, ge=1)
    """Answers that are generated side by side, or that a proxy has open."""
    max_queue: int = Field(default=64, ge=0)
    """Requests that may wait for their turn; one more is refused with 429."""
    request_timeout: float = Field(default=120.0, gt=0.0)
    """Seconds from a request's arrival to its end; what takes longer ends with 504."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Cap on generated tokens of one choice, and the default where a request names none."""
    workers: int = Field(default=0, ge=0, le=256)
    """Processes that serve, started again when one dies; 0 serves in the first process, with nobody above it."""
    threads: int = Field(default=0, ge=0)
    """Threads that one pass of the sidecar's model may use; 0 means as many as there are cores."""

    api_keys: SecretStr = SecretStr("")
    """Accepted keys, separated by commas."""
    api_keys_file: Path | None = None
    """File with one key a line, as `sailguard keys` writes it; see docs/server.md."""
    admin_keys: SecretStr = SecretStr("")
    """Keys that may use `/admin`, separated by commas. Without one, of these or in the file, `/admin` is closed."""
    rate_limit: str = ""
    """Requests that one key, or one address where there are no keys, may send: `600/minute`. Empty: no limit."""
    rate_storage: str = "memory://"
    """Where the rates are counted: in each process, or at a URI of the package `limits`, which several share."""
    key_concurrent: int = Field(default=0, ge=0)
    """Requests that one key may have open at a time; 0 means no limit."""
    allowed_hosts: str = ""
    """Further names, separated by commas, that a `Host` header may give to a server without keys."""
    cors_origins: str = ""
    """Origins, separated by commas, whose pages may call the server from a browser. Empty: none."""

    upstream: str | None = None
    """URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1; then this one is a proxy before it."""
    upstream_key: SecretStr = SecretStr("")
    """Key for the upstream server; without one, the client's own is passed on if this server has no keys."""
    hold_back: int = Field(default=16, ge=1)
    """Tokens of a proxied answer that wait until they have been judged, so many at a time."""

    audit: Path | None = None
    """SQLite file in which verdicts other than allow are kept; none keeps none."""
    audit_text: bool = False
    """Whether the audit keeps the texts that were judged, too."""
    audit_days: int = Field(default=90, ge=0)
    """Days after which entries of the audit are removed; 0 keeps them."""
    spool: Path | None = None
    """SQLite file in which judged texts are kept as the guard saw them, for a refit; none keeps none."""
    spool_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the requests that are kept whatever comes of them; what has a verdict is kept in any case."""
    spool_text: bool = False
    """Whether the texts themselves are kept, too."""
    spool_days: int = Field(default=90, ge=0)
    """Days after which items of the spool are removed, with their marks; 0 keeps them."""
    spool_max_bytes: int = Field(default=1024**3, ge=0)
    """Bytes from which on the oldest items that nobody has marked are removed; 0 means no limit."""
    shadow: Path | None = None
    """Folder of a candidate bank that judges beside the one in use and never acts; none means no candidate."""
    watch_seconds: float = Field(default=2.0, ge=0.0)
    """How often the bank's and the policy's files are looked at for a new version; 0 means never."""
    metrics_features: str = ""
    """Features, separated by commas, whose activations `/metrics` shows; at most 50."""
    tracing: bool = False
    """Whether spans are sent to the OpenTelemetry collector that OTEL_EXPORTER_OTLP_ENDPOINT names."""

    @field_validator("bank", mode="before")
    @classmethod
    def _shipped(cls, bank: object) -> object:
        return None if str(bank) == "shipped" else bank

    @field_validator("rate_limit")
    @classmethod
    def _rate(cls, rate: str) -> str:
        if rate:
            parse_rate(rate)
        return rate

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, hosts: str) -> str:
        if not all(_HOST_NAME.fullmatch(name) for name in _split(hosts)):
            raise ValueError("it holds names such as guard.example.org, without scheme and port, separated by commas")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: str) -> str:
        if not all(_ORIGIN.fullmatch(origin) for origin in _split(origins)):
            raise ValueError(
                "it holds origins such as https://chat.example.org, in lower case and without a path, separated by "
                "commas; each has to be named"
            )
        return origins

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            # The cause is dropped: its text holds the raw value, which may be a key.
            raise SettingsError(f"setting {name!r} (environment {_PREFIX}{name.upper()}): {first['msg']}") from None
        if not is_loopback(self.host) and not self.key_ring():
            raise SettingsError(
                f"setting 'host': {self.host!r} can be reached by other machines, but no API keys are set: "
                f"set {_PREFIX}API_KEYS or {_PREFIX}API_KEYS_FILE, or listen on 127.0.0.1"
            )

    def key_ring(self) -> KeyRing:
        """Return the accepted keys. Raises `SettingsError` for a key or a keys file that cannot be used."""
        return KeyRing(_listed(self.api_keys), admins=_listed(self.admin_keys), file=self.api_keys_file)

    def keys(self) -> list[str]:
        """Return the clients' keys themselves, for a server that cannot work with hashed ones.

        Raises `SettingsError` if the keys file cannot be used, or holds hashed keys.
        """
        keys = _listed(self.api_keys)
        if self.api_keys_file is not None:
            self.key_ring()
            lines = KeyFile.read(self.api_keys_file).lines
            if any(key is not None and not key.plain for _, key in lines):
                raise SettingsError(
                    f"setting 'api_keys_file': {str(self.api_keys_file)!r} holds hashed keys, of which vLLM's server "
                    "cannot make use: give it plain ones"
                )
            keys += [line.strip() for line, key in lines if key is not None]
        return keys

    @property
    def host_names(self) -> frozenset[str]:
        """The names of `allowed_hosts`."""
        return frozenset(_split(self.allowed_hosts.lower()))

    @property
    def shown_features(self) -> tuple[str, ...]:
        """The features of `metrics_features`."""
        return tuple(_split(self.metrics_features))

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `cors_origins`."""
        return tuple(_split(self.cors_origins))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _listed(keys: SecretStr) -> list[str]:
    return _split(keys.get_secret_value())


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
