"""A bank in Neuronpedia's layout, and the list of what that layout has no place for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bank.atomic import atomic_folder
from feature_bank.bank import Bank
from feature_bank.errors import BankError
from feature_bank.interop.neuronpedia import (
    ACTIVATION_COLUMNS,
    BATCH,
    EXPLANATION_COLUMNS,
    FEATURE_COLUMNS,
    KIND_PREFIX,
    identifier,
    slug,
    write_lines,
)
from feature_bank.interop.neuronpedia_losses import export_losses
from feature_bank.interop.records import Loss
from feature_bank.schema import Evidence, FeatureRecord, HookRecord

__all__ = ["Exported", "export_neuronpedia"]

_SITES = {"resid_post": "res", "resid_pre": "respre", "mlp_out": "mlp"}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    folder: Path
    model_id: str
    sources: tuple[str, ...]
    """One a hook point, in the bank's order."""
    features: int
    explanations: int
    activations: int
    losses: tuple[Loss, ...]


def export_neuronpedia(
    bank: Bank,
    folder: Path,
    *,
    model_id: str | None = None,
    set_name: str = "sailguard",
    creator: str = "sailguard",
    creator_id: str = "sailguard",
    reviews: int = 0,
) -> Exported:
    """Write all features of a bank as Neuronpedia lays out its exports, atomically.

    model_id: the model's name there, such as `smollm2-135m`; by default the bank's name for it, as an id.
    set_name: what the names of the sources begin with after the layer. creator_id: the user that all rows belong to.
    reviews: how many the bank has, for the list of losses.

    Raises BankError for a name that cannot be an id there.
    """
    model_id = slug(bank.manifest.model.id) if model_id is None else model_id
    for field, name in (("model_id", model_id), ("set_name", set_name)):
        if not re.fullmatch(r"[a-z0-9_-]{1,128}", name):
            raise BankError(f"{name!r} is no id there: lower-case letters, digits, - and _ only", field=field)
    writer = _Writer(bank=bank, model_id=model_id, set_name=set_name, creator=creator, creator_id=creator_id)
    with atomic_folder(folder) as tmp:
        writer.write(tmp)
    return Exported(
        folder=folder,
        model_id=model_id,
        sources=tuple(writer.source(hook) for hook in bank.manifest.hook_points),
        features=len(bank.features),
        explanations=writer.explanations,
        activations=writer.activations,
        losses=tuple(export_losses(bank, reviews=reviews)),
    )


class _Writer:
    """One export; counts what it writes."""

    def __init__(self, *, bank: Bank, model_id: str, set_name: str, creator: str, creator_id: str) -> None:
        self.bank, self.model_id, self.set_name = bank, model_id, set_name
        self.creator, self.creator_id = creator, creator_id
        self.explanations = self.activations = 0

    def set_of(self, hook: HookRecord) -> str:
        """`sailguard-res-4608`: what kind of hook point, and how many features its SAE has."""
        site = hook.hook_name.split(".hook_")[-1]
        return f"{self.set_name}-{_SITES.get(site, slug(site))}-{hook.d_sae}"

    def source(self, hook: HookRecord) -> str:
        return f"{self._features(hook)[0].layer}-{self.set_of(hook)}"

    def write(self, root: Path) -> None:
        for name, rows in (("explanation_type", self._kinds()), ("explanation_model_type", self._models())):
            if described := list(rows):
                write_lines(root / "config" / f"{name}.jsonl", described)
        for hook in self.bank.manifest.hook_points:
            source = self.source(hook)
            folder = root / self.model_id / source
            write_lines(folder / "model.jsonl", [self._model()])
            write_lines(folder / "release.jsonl", [self._release()])
            write_lines(folder / "sourceset.jsonl", [self._set(hook)])
            write_lines(folder / "source.jsonl", [self._source(hook)])
            features = self._features(hook)
            vectors = self.bank.rows[hook.hook_name].W_dec
            for number, start in enumerate(range(0, len(features), BATCH)):
                part = features[start : start + BATCH]
                rows = [
                    self._feature(f, source, self.set_of(hook), [float(v) for v in vectors[start + i]])
                    for i, f in enumerate(part)
                ]
                explanations = [self._explanation(f, source) for f in part if f.explanation]
                activations = [
                    self._activation(f, source, place, e)
                    for f in part
                    for place, e in enumerate(f.evidence)
                    if e.tokens
                ]
                self.explanations += len(explanations)
                self.activations += len(activations)
                for name, written in (("features", rows), ("explanations", explanations), ("activations", activations)):
                    if written:  # its importer fails on an empty file
                        write_lines(folder / name / f"batch-{number}.jsonl.gz", written)

    def _features(self, hook: HookRecord) -> list[FeatureRecord]:
        return [f for f in self.bank.features if f.hook_name == hook.hook_name]

    def _place(self, feature: FeatureRecord, source: str) -> dict[str, Any]:
        return {"modelId": self.model_id, "layer": source, "index": str(feature.index)}

    def _feature(self, feature: FeatureRecord, source: str, set_name: str, vector: list[float]) -> dict[str, Any]:
        bins = len(feature.histogram)
        largest = max((a for e in feature.evidence for a in (e.activation, *e.activations)), default=None)
        has_vector = any(vector)
        return {
            **FEATURE_COLUMNS,
            **self._place(feature, source),
            "maxActApprox": None if largest is None else largest * feature.scale,
            "creatorId": self.creator_id,
            "frac_nonzero": feature.density,
            "freq_hist_data_bar_heights": feature.histogram,
            "freq_hist_data_bar_values": [(i + 0.5) / bins * feature.scale for i in range(bins)],
            "sourceSetName": set_name,
            "hookName": feature.hook_name,
            "hasVector": has_vector,
            "vector": vector if has_vector else [],
            "vectorDefaultSteerStrength": feature.scale,
        }

    def _explanation(self, feature: FeatureRecord, source: str) -> dict[str, Any]:
        explainer = feature.explainer
        return {
            **EXPLANATION_COLUMNS,
            **self._place(feature, source),
            "id": identifier("explanation", self.model_id, source, feature.index),
            "authorId": self.creator_id,
            "description": feature.explanation,
            "typeName": None if explainer is None else KIND_PREFIX + explainer.method,
            "explanationModelName": None if explainer is None else explainer.model,
        }

    def _activation(self, feature: FeatureRecord, source: str, place: int, evidence: Evidence) -> dict[str, Any]:
        values = [a * feature.scale for a in evidence.activations]
        return {
            **ACTIVATION_COLUMNS,
            **self._place(feature, source),
            "id": identifier("activation", self.model_id, source, feature.index, place),
            "creatorId": self.creator_id,
            "tokens": evidence.tokens,
            "values": values,
            "maxValue": max(values),
            "minValue": min(values),
            "maxValueTokenIndex": values.index(max(values)),
        }

    def _model(self) -> dict[str, Any]:
        model = self.bank.manifest.model
        return {
            "id": self.model_id,
            "displayNameShort": model.id,
            "displayName": model.id,
            "creatorId": self.creator_id,
            "dimension": model.d_model,
            "instruct": bool(re.search(r"instruct|chat|-it\b", model.id.lower())),
            "layers": model.n_layers,
            "neuronsPerLayer": 0,
            "owner": "",
            "visibility": "PUBLIC",
        }

    def _release(self) -> dict[str, Any]:
        title = f"Feature bank {self.bank.manifest.name} {self.bank.manifest.version}"
        return {
            "name": slug(f"{self.bank.manifest.name}-{self.bank.manifest.version}"),
            "description": title,
            "descriptionShort": title,
            "creatorName": self.creator,
            "creatorId": self.creator_id,
            "visibility": "PUBLIC",
        }

    def _set(self, hook: HookRecord) -> dict[str, Any]:
        return {
            "modelId": self.model_id,
            "name": self.set_of(hook),
            "description": f"Selected features of SAEs of {hook.d_sae} features at {hook.hook_name.split('.')[-1]}",
            "creatorName": self.creator,
            "creatorId": self.creator_id,
            "releaseName": self._release()["name"],
            "visibility": "PUBLIC",
        }

    def _source(self, hook: HookRecord) -> dict[str, Any]:
        return {
            "id": self.source(hook),
            "modelId": self.model_id,
            "setName": self.set_of(hook),
            "creatorId": self.creator_id,
            "dataset": ", ".join(corpus.name for corpus in self.bank.manifest.corpus) or None,
            "notes": f"{hook.n_selected} of {hook.d_sae} features, from the bank {self.bank.version}",
            "visibility": "PUBLIC",
        }

    def _explainers(self) -> Sequence[tuple[str, str | None]]:
        return sorted({(f.explainer.method, f.explainer.model) for f in self.bank.features if f.explainer}, key=str)

    def _kinds(self) -> Iterable[dict[str, Any]]:
        for method in sorted({method for method, _ in self._explainers()}):
            yield {
                "name": KIND_PREFIX + method,
                "displayName": f"sailguard, {method}",
                "description": f"Explanations of sailguard's feature banks, method {method!r}",
                "featured": False,
                "isAttention": False,
                "creatorName": self.creator,
                "creatorId": self.creator_id,
            }

    def _models(self) -> Iterable[dict[str, Any]]:
        for model in sorted({model for _, model in self._explainers() if model is not None}):
            yield {
                "name": model,
                "displayName": model,
                "description": "A language model that explained features",
                "featured": False,
                "creatorName": self.creator,
            }
