"""New features for a refresh: a bank trained on a corpus and on what the spool holds of the traffic's texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_bank.bank import Bank
from feature_bank.errors import DataError
from training.packing import Report
from training.pipeline import Preset, train_bank
from training.refit import next_version
from training.refresh_traffic import write_traffic
from training.stages import HERE, Stages

__all__ = ["Retraining"]

TRAFFIC = "traffic.jsonl"


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """Trains SAEs and heads anew: the `retrain` of `training.refresh.refresh_bank`."""

    model: Any
    tokenizer: Any
    preset: Preset
    data: Sequence[Path]
    """The corpus, as `train` reads it."""
    stages: Stages = HERE

    def __call__(self, bank: Bank, spool: Path, work: Path, report: Report, apart: Collection[str] = ()) -> Bank:
        """A bank of the same name and model, one version further, with all that was kept on the way in `work`.

        Marked texts are labelled rows, but for one in five, and unmarked ones are read by the SAEs alone. Those that an
        earlier run took are trained on again, so that it can be gone on with although the spool has grown. apart: texts
        that nothing is trained on.

        Raises DataError if the spool holds no text, and what `train_bank` raises.
        """
        traffic = work / TRAFFIC
        taken = traffic.exists()
        rows = traffic.read_bytes().count(b"\n") if taken else write_traffic(spool, traffic, bank.heads)
        if not rows:
            traffic.unlink()
            raise DataError(
                f"{spool} holds no texts (the server keeps them with --spool-text alone), so SAEs would see nothing of "
                "the traffic; refresh the heads without retraining"
            )
        newer = f"; taken by an earlier run, remove {work} for newer ones" if taken else ""
        report("traffic", 1, 1, f"{rows} texts of the spool{newer}")
        preset = self.preset.model_copy(
            update={"name": bank.manifest.name, "version": next_version(bank.manifest.version)}
        )
        return train_bank(
            model=self.model,
            tokenizer=self.tokenizer,
            identity=bank.manifest.model,
            preset=preset,
            data=[*self.data, traffic],
            without=apart,
            out=work / "bank",
            work=work / "stages",
            report=report,
            stages=self.stages,
        )
