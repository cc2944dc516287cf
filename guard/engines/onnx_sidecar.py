"""The folder that the ONNX engine runs from: its manifest, and what is verified before anything of it is used.

    sidecar.json           what the folder is of, and the sha256 of every other file
    model.onnx             the graph in float32 (larger than 2 GB: and model.onnx.data)
    model.int8.onnx        the same with int8 weights
    tokenizer.json         the tokenizer, as the `tokenizers` library reads it
    bank/                  the feature bank that the graph was made of

Either graph maps right-padded `input_ids` and `attention_mask` (batch, length) to `feature_acts` (batch, length, F),
`evidence` (batch, length, D) and, if a response that streams has heads of its own, `streaming_evidence`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from feature_bank.bank import FEATURES, HEADS, REVIEWS, WEIGHTS, Bank, seal
from feature_bank.bank import MANIFEST as BANK_MANIFEST
from feature_bank.layout import Role
from feature_bank.schema import ModelIdentity, Record, Sha256
from guard.errors import GuardError

MANIFEST = "sidecar.json"
TOKENIZER = "tokenizer.json"
BANK = "bank"
BANK_FILES = (BANK_MANIFEST, FEATURES, WEIGHTS, HEADS, REVIEWS)
GRAPHS = {"int8": "model.int8.onnx", "fp32": "model.onnx"}
"""File of each precision, the preferred one first."""
SCHEMA_VERSION = 1
RUNTIME_EXTRA = "pip install 'sailguard[sidecar]'"
EXTRA = "pip install 'sailguard[onnx-export]'"

Precision = Literal["int8", "fp32"]


class GraphRecord(Record):
    """One graph: a precision, and how far it may be off."""

    file: str
    canary_tolerance: float = Field(gt=0.0, lt=1.0)
    """Largest accepted relative error of the bank's canary."""
    score_error: float = Field(ge=0.0, le=1.0)
    """Largest difference of a domain's score from the model's in torch, over the texts that it was checked with."""


class Sidecar(Record):
    """sidecar.json"""

    schema_version: Literal[1]
    created: str
    tool_version: str
    model: ModelIdentity
    context_length: int = Field(gt=0)
    """Most tokens the model takes at once."""
    hook_names: list[str] = Field(min_length=1)
    opset: int
    outputs: list[str]
    domains: list[str]
    """Of the last axis of the evidence, in order."""
    head_ids: dict[Role, list[int]]
    """The ids before a text in each role: of a prompt, what the chat template puts there."""
    special_ids: list[int]
    graphs: dict[Precision, GraphRecord] = Field(min_length=1)
    bank_hash: Sha256
    """The content hash of the bank in the folder."""
    files: dict[str, Sha256]
    """Of every file but this one, and but the bank's reviews, which may grow."""
    sha256: Sha256
    """Of this file itself, with zeros in place of the digest; see `feature_bank.bank.seal`."""

    @classmethod
    def load(cls, folder: Path) -> Sidecar:
        """Read the manifest. Raises GuardError naming file and field if it is missing, altered or of another kind."""
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
            data = json.loads(raw)
        except FileNotFoundError:
            raise GuardError(f"{folder} has no {MANIFEST}; make the folder with: sailguard export-onnx") from None
        except (OSError, ValueError, RecursionError) as error:
            raise GuardError(f"{path} cannot be read ({error}); export the bank again") from error
        found = data.get("schema_version") if isinstance(data, dict) else None
        if found != SCHEMA_VERSION:
            raise GuardError(
                f"{path}, field 'schema_version': {found!r} is unknown, this version reads {SCHEMA_VERSION}; "
                "export the bank again"
            )
        try:
            sidecar = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise GuardError(f"{path}, field {field!r}: {first['msg']}; export the bank again") from error
        if seal(raw) != raw:
            raise GuardError(f"{path} was altered: its sha256 is not that of the rest; export the bank again")
        return sidecar

    def save(self, folder: Path) -> None:
        """Write the manifest, sealed."""
        (folder / MANIFEST).write_bytes(seal(self.model_dump_json(indent=2).encode() + b"\n"))

    def verify(self, folder: Path, precision: Precision) -> None:
        """Raise GuardError naming the file if one that this precision needs is missing or was altered."""
        others = {graph.file for name, graph in self.graphs.items() if name != precision}
        for name, expected in self.files.items():
            if name.removesuffix(".data") in others:
                continue
            if (found := hash_file(folder / name)) != expected:
                raise GuardError(
                    f"{folder / name} was altered: its sha256 is {found}, expected {expected}; export the bank again"
                )

    def choose(self, precision: Precision | None) -> Precision:
        """The precision asked for, else int8 if it is there. Raises GuardError if the folder does not have it."""
        if precision is None:
            return next(name for name in ("int8", "fp32") if name in self.graphs)
        if precision not in self.graphs:
            raise GuardError(
                f"the folder has no {precision} graph, only {', '.join(self.graphs)}; "
                f"export the bank again with --{precision}"
            )
        return precision

    def read_bank(self, folder: Path) -> Bank:
        """The bank in the folder. Raises BankError if it is not whole, GuardError if it is another one."""
        bank = Bank.load(folder / BANK)
        if bank.content_hash != self.bank_hash:
            raise GuardError(f"{folder / BANK} is not the bank that was exported; export the bank again")
        return bank


def check_fits(given: Bank, exported: Bank) -> None:
    """Raise GuardError unless a graph made of the `exported` bank gives the activations of the `given` one: the same
    rows of the same model. Heads, thresholds and explanations may be others, for they are applied after the graph."""
    same = {
        "the model": given.manifest.model == exported.manifest.model,
        "the encoder rows": given.manifest.files[WEIGHTS] == exported.manifest.files[WEIGHTS],
        "the hook points": given.hook_names == exported.hook_names,
        "the features": [f.id for f in given.features] == [f.id for f in exported.features],
        "the features' scales": [f.scale for f in given.features] == [f.scale for f in exported.features],
    }
    if other := [name for name, equal in same.items() if not equal]:
        raise GuardError(
            f"bank {given.version} is not what was exported, which is {exported.version}: "
            f"{' and '.join(other)} differ; export it with: sailguard export-onnx BANK FOLDER"
        )


def hash_file(path: Path) -> str:
    """sha256 of a file. Raises GuardError if it is missing or cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GuardError(f"{path} cannot be read ({error.strerror}); export the bank again") from error
