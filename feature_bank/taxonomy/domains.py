"""The four safety domains. A score means "this content is present"; what to do about it is policy."""

from __future__ import annotations

from typing import Literal, get_args

Domain = Literal["pornography", "politics", "violence", "terror"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
