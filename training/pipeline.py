"""From files of text to a bank: the stages in order, each resumable, each reported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from feature_bank.atomic import atomic_file
from feature_bank.bank import Bank
from feature_bank.errors import DataError, SailguardError
from feature_bank.formats.saelens import WEIGHTS_FILE
from feature_bank.identity import weights_digest
from feature_bank.schema import CorpusRecord, ModelIdentity, Pooling
from feature_bank.taxonomy import Taxonomy, load_taxonomy, taxonomy_files
from guard.hook_points import parse_hook_name
from training.admission import AdmissionRules
from training.cache import Harvest
from training.candidates import Contrasts
from training.contrast import LICENCE, harvest_contrasts, taxonomy_texts
from training.corpus import Document, TokenSequence, corpus_hash, read_documents, tokenise
from training.directions import add_directions
from training.packing import build_bank
from training.reader import ActivationReader
from training.selected import TrainedHook
from training.stages import HERE, Stages
from training.sweep import PREFIX, Reporter
from training.trainer import SaeRun, TrainerConfig

_HERE = Path(__file__).parent
# What the stages that keep results (activations, SAEs) depend on; the later ones are made anew each time,
# but for what an interrupted one had described, which depends on all that it was made from.
_CACHED = {"hook_points", "labelled_tokens", "general_tokens", "general_budget", "sae", "seed", "own_corpora"}


class SaeSettings(BaseModel):
    """The preset's part for the SAEs; see `TrainerConfig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    expansion: int = Field(default=8, ge=1, le=256)
    k: int = Field(default=32, ge=1)
    batch_tokens: int = Field(default=2048, ge=1)
    epochs: int = Field(default=1, ge=1)
    lr: float = Field(default=1.2e-3, gt=0)


class Preset(BaseModel):
    """Everything that decides what bank comes out, but for the text and the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    version: str
    hook_points: tuple[str, ...] = Field(min_length=1)
    labelled_tokens: int = Field(default=160, ge=8)
    general_tokens: int = Field(default=128, ge=8)
    general_budget: int = Field(default=250_000, ge=0)
    sae: SaeSettings = SaeSettings()
    directions: bool = True
    """Whether every hook point gets a direction a domain and a concept beside the SAE's features."""
    pooling: Pooling
    candidates: int = Field(default=500, ge=1)
    """Features a domain and hook point that a first fit of the heads may choose from."""
    described_per_head: int = Field(default=320, ge=1)
    """Features a domain that this fit keeps: they are explained, scored and judged."""
    described_for_steering: int = Field(default=16, ge=0)
    """The same of those that carry most of a domain's mean difference, a hook point."""
    admission: AdmissionRules = AdmissionRules()
    features_per_head: int = Field(default=128, ge=1)
    """Admitted features a domain that its head uses, at most."""
    head_tolerance: float = Field(default=0.0, ge=0.0, lt=0.5)
    """AUROC on the calibration split that a head with fewer features may cost; 0 keeps all of them."""
    steering_features: int = Field(default=16, ge=0)
    """Admitted features a domain and hook point that steering uses, at most."""
    taxonomy: Path | None = None
    """Folder of taxonomy files; the shipped ones if left out."""
    seed: int = 0
    canary: str = Field(min_length=20)
    own_corpora: bool = True
    """Whether the text written for the project is added to the given files."""

    @field_validator("hook_points")
    @classmethod
    def _one_a_layer(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            layers = [parse_hook_name(name).layer for name in names]
        except SailguardError as e:
            raise ValueError(str(e)) from e
        if len(set(layers)) != len(layers):
            raise ValueError("two hook points lie in one layer, but a feature's id names only its layer and index")
        return names


def load_preset(name: str) -> Preset:
    """A shipped preset by name, or a YAML file by path. Raises DataError naming the field that is wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _HERE / "presets" / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in (_HERE / "presets").glob("*.yaml") if not p.stem.startswith(PREFIX)))
        raise DataError(f"preset {name!r} not found; shipped are {shipped}, or give the path of a YAML file")
    try:
        return Preset.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as e:
        first = e.errors()[0]
        place = f", field {'.'.join(map(str, first['loc']))!r}" if first["loc"] else ""
        raise DataError(f"preset {str(path)!r}{place}: {first['msg']}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"preset {str(path)!r} is not valid YAML: {e}") from e


def own_corpora() -> list[Path]:
    """The files of text written for the project."""
    return sorted((_HERE / "corpora").glob("*.jsonl"))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What heads and explanations are made from: documents, their activations, and the SAEs trained on them."""

    documents: list[Document]
    records: list[CorpusRecord]
    cache: Harvest
    hooks: list[TrainedHook]
    contrasts: Contrasts


def prepare(
    *,
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    preset: Preset,
    data: Sequence[Path],
    work: Path,
    report: Reporter,
    stages: Stages = HERE,
    without: Collection[str] = (),
) -> Prepared:
    """Read, harvest and train the SAEs, or find it all in `work`, the folder of an earlier run of the same.

    stages: who harvests and trains, by default this process. without: texts of the files that are left out.

    Raises DataError for bad rows, too little text, no labelled text, or a work folder of another run.
    """
    files = [*data, *(own_corpora() if preset.own_corpora else [])]
    documents, records = read_documents(files)
    documents = [d for d in documents if d.text not in without]
    if not any(d.known for d in documents):
        raise DataError("no row of the files has labels ('domains', 'known'); heads cannot be fitted without")
    documents, sequences = _budget(documents, tokenizer, preset)
    report("corpus", 1, 1, f"{len(documents):,} documents, {sum(len(s.positions) for s in sequences):,} tokens")
    _claim(work, preset, documents, identity, model)

    fingerprint = {"model": identity.config_hash, "tokenizer": identity.tokenizer_hash}
    cache = stages.harvest(
        model,
        sequences,
        preset.hook_points,
        work / "activations",
        fingerprint=fingerprint,
        on_shard=lambda done, total, tokens: report("harvest", done, total, f"{tokens:,} tokens"),
    )
    taxonomy = load_taxonomy(preset.taxonomy)
    texts = taxonomy_texts(taxonomy)
    pairs = harvest_contrasts(
        model, tokenizer, texts, preset.hook_points, work / "contrasts", fingerprint=fingerprint, report=report
    )
    hooks = _train_hooks(cache, identity, preset, work, report, stages)
    if preset.directions:
        hooks = [add_directions(hook, cache, documents, texts, pairs) for hook in hooks]
        report("directions", 1, 1, f"{len(hooks[0].directions)} at each hook point")
    return Prepared(
        documents=documents,
        records=[*records, *_taxonomy_records(preset.taxonomy, taxonomy)],
        cache=cache,
        hooks=hooks,
        contrasts=Contrasts(taxonomy=taxonomy, texts=texts, cache=pairs),
    )


def _taxonomy_records(folder: Path | None, taxonomy: Taxonomy) -> list[CorpusRecord]:
    """The taxonomy's files as corpora: what is measured on the contrast pairs rests on them."""
    return [
        CorpusRecord(
            name=f"taxonomy/{path.name}",
            licence=LICENCE,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            rows=sum(1 for concept in taxonomy[domain].concepts for _ in concept.texts()),
        )
        for domain, path in zip(taxonomy, taxonomy_files(folder), strict=True)
    ]


def train_bank(
    *,
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    preset: Preset,
    data: Sequence[Path],
    out: Path,
    work: Path,
    report: Reporter,
    stages: Stages = HERE,
    without: Collection[str] = (),
) -> Bank:
    """Train a bank from files of text rows and write it to `out`.

    Stages keep their results under `work`: run again after an interruption, finished ones are not repeated.
    stages, without: see `prepare`.

    Raises DataError for bad rows, too little text, no labelled text, or a work folder of another run.
    """
    prepared = prepare(
        model=model,
        tokenizer=tokenizer,
        identity=identity,
        preset=preset,
        data=data,
        work=work,
        report=report,
        stages=stages,
        without=without,
    )
    return build_bank(
        model=model,
        tokenizer=tokenizer,
        preset=preset,
        prepared=prepared,
        out=out,
        work=work,
        manifest=manifest_head(preset, identity, prepared.records),
        report=report,
        spread=stages.spread,
    )


def manifest_head(preset: Preset, identity: ModelIdentity, records: list[CorpusRecord]) -> dict[str, Any]:
    """The manifest's fields that are known before there is a bank."""
    return {
        "name": preset.name,
        "version": preset.version,
        "created": datetime.now(UTC).strftime("%Y-%m-%d"),
        "tool_version": version("sailguard"),
        "model": identity.model_dump(),
        "corpus": [record.model_dump() for record in records],
    }


def _budget(documents: list[Document], tokenizer: Any, preset: Preset) -> tuple[list[Document], list[TokenSequence]]:
    """All labelled documents, and of the others as many as the budget allows, in the order of their ids' hashes."""
    labelled = [d for d in documents if d.known]
    general = sorted((d for d in documents if not d.known), key=lambda d: hashlib.sha256(d.id.encode()).digest())
    sequences = tokenise(labelled, tokenizer, max_tokens=preset.labelled_tokens)
    left = preset.general_budget
    for start in range(0, len(general), 1000):
        if left <= 0:
            break
        for sequence in tokenise(general[start : start + 1000], tokenizer, max_tokens=preset.general_tokens):
            if left <= 0:
                break
            left -= len(sequence.positions)
            labelled.append(general[start + sequence.document])
            sequences.append(replace(sequence, document=len(labelled) - 1))
    return labelled, sequences


def _claim(work: Path, preset: Preset, documents: Sequence[Document], identity: ModelIdentity, model: Any) -> None:
    """Mark the work folder as this run's, or refuse another's."""
    mine = json.dumps(
        {
            "preset": preset.model_dump(mode="json", include=_CACHED),
            "corpus": corpus_hash(documents),
            "model": identity.config_hash,
            "weights": weights_digest(model),
        },
        indent=1,
    )
    path = work / "run.json"
    if path.exists():
        if path.read_text(encoding="utf-8") != mine:
            raise DataError(
                f"{work} holds another run (other preset, text or model); remove it, or name another folder"
            )
        return
    with atomic_file(path) as tmp:
        tmp.write_text(mine, encoding="utf-8")


def _train_hooks(
    cache: Harvest, identity: ModelIdentity, preset: Preset, work: Path, report: Reporter, stages: Stages
) -> list[TrainedHook]:
    """Train (or read back) the SAEs of all hook points."""
    settings = preset.sae.model_dump()
    config = TrainerConfig(options={"k": settings.pop("k")}, **settings, seed=preset.seed)
    reader = ActivationReader(cache, preset.hook_points, batch_tokens=config.batch_tokens, seed=preset.seed)
    trained = stages.train_saes(
        reader,
        [SaeRun(name, config, name=name) for name in preset.hook_points],
        work,
        on_step=lambda run, step, steps, stats: report(f"sae {run.name}", step, steps, _described(stats._asdict())),
        model_name=identity.id,
    )
    hooks = []
    for found in trained:
        report(f"sae {found.run.name}", 1, 1, _described(found.figures))
        hooks.append(
            TrainedHook(
                sae=found.load(),
                sha256=hashlib.sha256((found.folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
                k=preset.sae.k,
                fvu=found.figures["fvu"],
                l0=found.figures["l0"],
                dead_fraction=found.figures["dead_fraction"],
            )
        )
    return hooks


def _described(figures: Mapping[str, float]) -> str:
    return f"fvu {figures['fvu']:.3f}, l0 {figures['l0']:.0f}, dead {figures['dead_fraction']:.1%}"
