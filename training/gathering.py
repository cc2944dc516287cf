"""What a language model may be shown of a bank's features, gathered for `train explain` into the work folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.schema import FeatureRecord
from training.candidates import Contrasts, encode
from training.explain.evidence import Twins, collect_evidence
from training.explain.material import Material, save_material
from training.explain.segmented import SegmentedText
from training.selected import Selection, TrainedHook
from training.simulation.llm import SegmentText
from training.simulation.samples import choose_samples

FloatArray = npt.NDArray[np.float32]


def gather_material(
    path: Path,
    selection: Selection,
    records: Sequence[FeatureRecord],
    text: SegmentedText,
    hooks: Sequence[TrainedHook],
    contrasts: Contrasts,
    scales: Mapping[str, FloatArray],
    tokenizer: Any,
    *,
    seed: int,
) -> None:
    """Write evidence and test segments of each of a bank's features, in their order, to `path`."""
    evidence = collect_evidence(
        selection.acts,
        selection.keys,
        text,
        tokenizer.decode,
        triggers=[[term.text for term in record.trigger_tokens] for record in records],
        promoted=[record.promoted_tokens for record in records],
        domains=[record.domains for record in records],
        concepts=[record.concepts for record in records],
        twins=Twins(
            acts=encode(hooks, selection.keys, contrasts.cache, scales).acts,
            token_ids=contrasts.cache.token_ids,
            documents=contrasts.cache.documents,
            pairs=[(pair.positive, pair.negative) for pair in contrasts.texts.pairs if pair.split == "train"],
        ),
        seed=seed,
    )
    tested = _tested(selection, text, tokenizer, seed)
    save_material(path, (Material(evidence=e, segments=s) for e, s in zip(evidence, tested, strict=True)))


def _tested(selection: Selection, text: SegmentedText, tokenizer: Any, seed: int) -> Iterator[tuple[SegmentText, ...]]:
    """Per feature the segments that its explanation is scored on, those of the executable scores."""
    segments = text.segments
    for i, sample in enumerate(choose_samples(selection.acts, selection.keys, text, seed=seed)):
        found = []
        for number in sample.numbers.tolist():
            rows = slice(int(segments.starts[number]), int(segments.stops[number]))
            found.append(
                SegmentText(
                    tokens=tuple(text.tokens(number)),
                    activations=tuple(round(float(a), 4) for a in selection.acts[rows, i]),
                    text=tokenizer.decode(text.token_ids[rows].tolist()),
                    document=int(segments.documents[number]),
                )
            )
        yield tuple(found)
