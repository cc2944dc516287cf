"""A made-up database in Safe-SAIL's layout, small enough to count by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "1_5": {
        "explanation": "Names of parliaments and their chambers.",
        "correlation_score": 0.41,
        "tag_list": ["politics"],
    },
    "1_2": {"explanation": "***", "correlation_score": 0.35, "tag_list": ["politics", "violence"]},
    "2_0": {"explanation": None, "correlation_score": 0.25, "tag_list": ["terror"]},
    "2_7": {
        "explanation": "Accounts of battles and sieges.",
        "correlation_score": 0.52,
        "tag_list": ["violence", "terror"],
    },
    "2_11": {"explanation": "Commas after the first word of a line.", "correlation_score": 0.61, "tag_list": []},
    "1_9": {
        "explanation": "Elections: ballots and their counting.",
        "correlation_score": -0.1,
        "tag_list": ["politics"],
    },
}


def write_database(path: Path, rows: Any = None) -> Path:
    """`rows` (those above by default) as JSON, gzipped if the name says so."""
    raw = json.dumps(ROWS if rows is None else rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path
