"""`eval`: how well the bank separates labelled texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service.commands.options import BankOption, DataOption, JsonOption, ModelOption
from service.commands.score import score_texts
from service.commands.session import opened
from service.commands.terminal import output_console, print_json

if TYPE_CHECKING:
    from rich.table import Table


__all__ = ["evaluate"]


def evaluate(data: DataOption, model: ModelOption = None, bank: BankOption = None, as_json: JsonOption = False) -> None:
    """Measure the bank on labelled rows: ranking quality, and the threshold for 1 % false positives.

    Rows carry `text`, `domains` (those present) and `known` (those whose label is known); a domain is
    measured on the rows where it is known. Exact repeats of a text count once.
    """
    from training.corpus import read_documents
    from training.evaluation import measure_domains

    documents, corpora = read_documents(data)
    with opened(model, bank, None) as attached:
        texts = ((document.text, document.role) for document in documents)
        scores = [result.scores for result in score_texts(attached, texts, len(documents))]
        found = measure_domains(documents, scores, attached.guard.bank.heads)
        version = attached.guard.bank.version
    if as_json:
        print_json(
            {
                "bank": version,
                "data": [corpus.model_dump() for corpus in corpora],
                "documents": len(documents),
                "domains": {domain: quality.to_dict() for domain, quality in found.items()},
            }
        )
        return
    console = output_console()
    console.print(_table(found))
    console.print("\ntpr: true-positive rate; fpr: false-positive rate. The last three columns stand at the bank's")
    console.print("threshold for 1 % false positives, which was set on other texts.")


def _table(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("domain")
    for name in ("n", "positive", "auroc", "auprc", "tpr@1%", "tpr@5%", "threshold", "tpr", "fpr"):
        table.add_column(name, justify="right", no_wrap=True)
    for domain, quality in found.items():
        point = quality.operating_point
        at_point = ("-", "-", "-") if point is None else map(_figure, (point.threshold, point.tpr, point.fpr))
        table.add_row(
            domain,
            str(quality.n),
            str(quality.positives),
            _figure(quality.auroc),
            _figure(quality.auprc),
            *(_figure(tpr) for tpr in quality.tpr_at_fpr.values()),
            *at_point,
        )
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
