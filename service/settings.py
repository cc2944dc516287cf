"""Settings of the server: keyword arguments first, then environment variables named `SAILGUARD_*`."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsError

__all__ = ["KeyRing", "Settings", "is_loopback"]

_PREFIX = "SAILGUARD_"


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
    max_queue: int = Field(default=16, ge=0)
    """Requests that may wait while one is served; one more is refused with 429."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Cap on generated tokens of one choice, and the default where a request names none."""
    api_keys: SecretStr = SecretStr("")
    """Accepted keys, separated by commas."""
    api_keys_file: Path | None = None
    """File with one accepted key a line, beside `api_keys`; empty lines and lines with `#` are skipped."""

    @field_validator("bank", mode="before")
    @classmethod
    def _shipped(cls, bank: object) -> object:
        return None if str(bank) == "shipped" else bank

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
        """Return the accepted keys' digests. Raises as `keys` does."""
        return KeyRing(self.keys())

    def keys(self) -> list[str]:
        """Return the accepted keys. Raises `SettingsError` if the key file cannot be read or holds none."""
        keys = self.api_keys.get_secret_value().split(",")
        if self.api_keys_file is not None:
            try:
                lines = self.api_keys_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(
                    f"setting 'api_keys_file': cannot read {str(self.api_keys_file)!r}: {error}"
                ) from error
            found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise SettingsError(
                    f"setting 'api_keys_file': {str(self.api_keys_file)!r} holds no key: write one a line"
                )
            keys += found
        return [key.strip() for key in keys if key.strip()]


class KeyRing:
    """The accepted API keys, kept as sha256 digests; false when there are none."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = tuple({_digest(key.encode()) for key in keys})

    def __len__(self) -> int:
        return len(self._digests)

    def accepts(self, key: bytes) -> bool:
        """Whether `key` is one of the accepted keys. The time taken does not depend on how close it comes."""
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
