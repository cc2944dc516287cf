"""Writing the folder that the ONNX engine runs from, and proving that it gives what the model in torch gives."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from feature_bank.atomic import atomic_folder
from feature_bank.bank import Bank, bank_folder
from feature_bank.errors import MissingExtraError
from feature_bank.identity import check_identity
from feature_bank.layout import ROLES, Role, head_ids, render
from guard.canary import canary_activations, canary_error
from guard.engines.onnx import MAX_TOKENS, OnnxEngine
from guard.engines.onnx_model import ExportedModel
from guard.engines.onnx_sidecar import (
    BANK,
    BANK_FILES,
    EXTRA,
    GRAPHS,
    MANIFEST,
    SCHEMA_VERSION,
    TOKENIZER,
    GraphRecord,
    Precision,
    Sidecar,
    hash_file,
)
from guard.errors import GuardError
from guard.events import TextScore
from guard.metrics import Metrics
from guard.monitor import Monitor
from guard.policy import Policy
from guard.text_scoring import TextScorer

_TEXTS = 48  # that channels are measured on, and scores compared on
_TEXT_TOKENS = 256
_FP32_ERROR = 1e-4  # of a score; more means that the graph is not the model
_INT8_CANARY = 0.3  # relative error of the canary beyond which int8 is not worth having


class Exported(NamedTuple):
    """What an export has written."""

    folder: Path
    sidecar: Sidecar


def export_onnx(
    bank_path: Path, out: Path, model: Any, tokenizer: Any, *, precisions: Sequence[Precision] = ("fp32", "int8")
) -> Exported:
    """Write `out`, atomically: the graph of `model` (float32, on the CPU) with the bank's rows and heads, the tokenizer
    and the bank. Every graph is run once before the folder takes its place.

    Raises BankError if the bank was made for another model, MissingExtraError without the extra, GuardError if the
    model or its tokenizer cannot be exported, or a graph does not give what the model gives.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    from guard.engines.onnx_graph import ENCODER, LARGEST, OPSET, write_graph
    from guard.engines.onnx_quantise import write_int8

    source = bank_folder(bank_path).resolve()
    bank = Bank.load(source)
    check_identity(model, tokenizer, bank.manifest.model)
    _check_replaceable(out)
    texts = _texts(bank)
    with atomic_folder(out) as tmp:
        names = write_graph(model, bank, tmp / GRAPHS["fp32"])
        if "int8" in precisions:
            ids = [render(tokenizer, text, role, max_tokens=_TEXT_TOKENS).ids for text, role in texts]
            write_int8(tmp / GRAPHS["fp32"], tmp / GRAPHS["int8"], ids, ENCODER, LARGEST)
        if "fp32" not in precisions:
            for file in tmp.glob(f"{GRAPHS['fp32']}*"):
                file.unlink()
        _write_tokenizer(tokenizer, tmp / TOKENIZER)
        (tmp / BANK).mkdir()
        for name in BANK_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, tmp / BANK / name)
        draft = _sidecar(tmp, bank, model, tokenizer, names, OPSET, precisions)
        sidecar = _checked(tmp, draft, bank, model, tokenizer, texts)
        sidecar.save(tmp)
    return Exported(out, sidecar)


def _need(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingExtraError(f"the export needs {package}: {EXTRA}")


def _check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that holds something else."""
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).exists() or not any(out.iterdir()))):
        raise GuardError(f"{out} exists and was not written by export-onnx; name another folder")


def _write_tokenizer(tokenizer: Any, path: Path) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GuardError(f"{type(tokenizer).__name__} has no tokenizer.json; load the model with its fast tokenizer")
    backend.save(str(path))


def _texts(bank: Bank) -> list[tuple[str, Role]]:
    """Texts that come with the bank, the roles in turn: its canary, and excerpts that its features fire on."""
    excerpts = [evidence.text for feature in bank.features for evidence in feature.evidence[:1]]
    step = max(1, len(excerpts) // (_TEXTS - 1))
    chosen = [bank.manifest.canary.text, *excerpts[::step]][:_TEXTS]
    chosen += [bank.manifest.canary.text] * (len(ROLES) - 1)
    return list(zip(chosen, islice(cycle(ROLES), len(chosen)), strict=True))


def _sidecar(
    folder: Path,
    bank: Bank,
    model: Any,
    tokenizer: Any,
    outputs: list[str],
    opset: int,
    precisions: Sequence[Precision],
) -> Sidecar:
    """The manifest before anything was checked: every graph may be off as far as it can."""
    context = int(model.config.max_position_embeddings)
    heads: Mapping[Role, list[int]] = {role: head_ids(tokenizer, role) for role in ROLES}
    if context < 8 + max(map(len, heads.values())):
        raise GuardError(f"the model takes {context} tokens, which leaves no room for text after its chat template")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Sidecar(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=metadata.version("sailguard"),
        model=bank.manifest.model,
        context_length=context,
        hook_names=list(bank.hook_names),
        opset=opset,
        outputs=outputs,
        domains=list(bank.heads),
        head_ids=dict(heads),
        special_ids=sorted(tokenizer.all_special_ids),
        graphs={
            name: GraphRecord(file=GRAPHS[name], canary_tolerance=0.999, score_error=1.0)
            for name in GRAPHS
            if name in precisions
        },
        bank_hash=bank.content_hash,
        files={
            path.relative_to(folder).as_posix(): hash_file(path)
            for path in files
            if path.relative_to(folder).as_posix() != f"{BANK}/{BANK_FILES[-1]}"
        },
        sha256="0" * 64,
    )


def _checked(
    folder: Path, draft: Sidecar, bank: Bank, model: Any, tokenizer: Any, texts: Sequence[tuple[str, Role]]
) -> Sidecar:
    """The manifest with what every graph is off by. Raises GuardError if that is too much."""
    policy = Policy(rules=())
    monitor = Monitor(bank, policy, torch.device("cpu"))
    read, roles = [text for text, _ in texts], [role for _, role in texts]
    expected = TextScorer(monitor, model, tokenizer).score(read, roles)
    canary = canary_activations(monitor.encoder, model, tokenizer, bank.manifest.canary.text)
    if (off := canary_error(bank, canary)) > bank.manifest.canary.tolerance:
        raise GuardError(f"the model gives canary activations {off:.1%} off the bank's; it is not the bank's model")
    draft.save(folder)
    graphs = {}
    for name, graph in draft.graphs.items():
        exported = ExportedModel.load(folder, name, 0)
        engine = OnnxEngine(exported, exported.bank, policy, Metrics(), MAX_TOKENS)
        error, off = _score_error(engine.score(read, roles), expected), exported.canary_error(bank)
        tolerance = bank.manifest.canary.tolerance
        if name == "int8":
            tolerance = min(max(tolerance, 1.5 * off), _INT8_CANARY)
        if off > tolerance or (name == "fp32" and error > _FP32_ERROR):
            raise GuardError(
                f"the {name} graph does not give what the model gives: the canary is {off:.1%} off, a score "
                f"{error:.2g}; export without it (--{'fp32' if name == 'int8' else 'int8'} alone) and report this"
            )
        graphs[name] = graph.model_copy(update={"canary_tolerance": tolerance, "score_error": error})
    return draft.model_copy(update={"graphs": graphs})


def _score_error(found: Sequence[TextScore], expected: Sequence[TextScore]) -> float:
    """The largest difference of a domain's score."""
    return max(
        abs(mine.scores[domain] - theirs.scores[domain])
        for mine, theirs in zip(found, expected, strict=True)
        for domain in theirs.scores
    )
