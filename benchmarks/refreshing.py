"""What a refresh mends and what it costs: harmless texts that flag are marked, and the two versions compared on others.

    python -m benchmarks.refreshing --data FOLDER [--work FOLDER]

Fifty harmless sentences about town councils and parliament buildings flag politics. A server judges them with a spool,
all are marked as false positives, and the heads are refreshed twice: held by the project's own texts alone, and also by
those of FOLDER's `fit.jsonl.gz` that have a label for politics and one in eight of `general.jsonl.gz`. Both candidates
are measured on `dev.jsonl.gz`, which nothing is fitted on.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Figure, write_result
from feature_bank.bank import shipped_bank_path
from feature_bank.spool import Selection, Spool
from guard.models import LoadedModel, load_model
from training.refresh import Refreshed, refresh_bank

DOMAIN = "politics"
SAMPLE = 8  # one of so many rows without labels
FILES = ("fit.jsonl.gz", "general.jsonl.gz", "dev.jsonl.gz")
FORMS = ("whole", "streaming")
WORSE = {"auroc": -1, "tpr_0.01": -1, "tpr_0.05": -1, "fpr_0.01": 1, "fpr_0.05": 1}
PLACES = ("Oslo", "Kyoto", "Lyon", "Bergen", "Porto")
CIVIC = (
    "The town council of {} meets on the first Monday of the month in the old assembly hall.",
    "In {}, the parliament building was designed by an architect who had studied in Vienna.",
    "Guided tours of the parliament building in {} start at the east door and last an hour.",
    "The parliament square in {} is paved with granite and lined with two rows of lime trees.",
    "The old senate house in {} is a museum today and shows furniture, maps and portraits.",
    "The city council of {} looks after the parks, the street lamps and the public library.",
    "A tram stop stands in front of the ministry of transport building in {}, near the river.",
    "The municipal archive of {} keeps the minutes of council meetings in a dry cellar.",
    "The prime minister's office in {} occupies a former palace with a public garden.",
    "The senate library in {} holds the printed debates of the upper house since 1870.",
)
TEXTS = [sentence.format(place) for sentence in CIVIC for place in PLACES]


def judge(bank: Path, **settings: Any) -> int:
    """How many of the texts a server flags that serves the bank."""
    import structlog
    from fastapi.testclient import TestClient

    from service.app import create_app
    from service.engine import TransformersEngine
    from service.settings import Settings

    key = "a-key-of-the-benchmark"
    given = Settings(api_keys=key, watch_seconds=0, bank=bank, **settings)
    app = create_app(
        lambda metrics: TransformersEngine.start(given, metrics),
        given,
        logger=structlog.wrap_logger(structlog.testing.CapturingLogger()),
    )
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.1)
        reply = client.post("/v1/moderations", json={"input": TEXTS, "role": "passage"})
        reply.raise_for_status()
        return sum(result["sailguard"][DOMAIN]["flagged"] for result in reply.json()["results"])


def mark_all(spool: Path) -> int:
    """Mark what was flagged as false positives; returns how many that were."""
    with Spool.open_for_writing(spool) as opened:
        items = list(opened.items(Selection(flagged=DOMAIN), acts=False))
        for item in items:
            assert item.id is not None
            opened.mark(item.id, DOMAIN, "false_positive", reviewer="the benchmark")
    return len(items)


def corpus(data: Path, scratch: Path) -> list[Path]:
    """The rows that hold the heads: those with a label for the domain, and a sample of the others."""
    found = [scratch / "fit.jsonl", scratch / "general.jsonl"]
    with gzip.open(data / "fit.jsonl.gz", "rt", encoding="utf-8") as rows, found[0].open("w", encoding="utf-8") as file:
        file.writelines(line for line in rows if DOMAIN in json.loads(line).get("known", ()))
    with (
        gzip.open(data / "general.jsonl.gz", "rt", encoding="utf-8") as rows,
        found[1].open("w", encoding="utf-8") as file,
    ):
        file.writelines(itertools.islice(rows, SAMPLE // 4, None, SAMPLE))
    return found


def worst_loss(measured: Mapping[str, Any]) -> float:
    """The most that any figure got worse by that decides on a promotion, over both forms of the head."""
    return max(
        (measured[form][key]["after"]["value"] - measured[form][key]["before"]["value"]) * sign
        for form in FORMS
        for key, sign in WORSE.items()
    )


def figures_of(name: str, found: Refreshed, flagged: int) -> dict[str, Figure]:
    """What one candidate mends, and what it costs on text that was never fitted on."""
    dev = found.report["fixed"]["--dev"][DOMAIN]
    n = dev["texts"]
    figures = {
        f"marked_flagged_{name}": Figure(value=flagged, unit="texts", n=len(TEXTS)),
        f"dev_worst_loss_{name}": Figure(value=round(worst_loss(dev), 4), unit="share", n=n),
    }
    for key in WORSE:
        value = dev["whole"][key]["after"]["value"]
        figures[f"dev_{key.replace('.', '')}_{name}"] = Figure(value=round(value, 4), unit="share", n=n)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"a folder with {', '.join(FILES)}")
    parser.add_argument("--work", type=Path, default=None, help="where encoded texts are kept for a second run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    for name in FILES:
        if not (options.data / name).is_file():
            parser.error(f"--data {options.data}: there is no {name} in it")
    loaded = load_model()
    with tempfile.TemporaryDirectory() as scratch:
        measured = _measure(loaded, options.data, Path(scratch), options.work or Path(scratch) / "work")
    print(write_result("refresh", *measured, folder=options.out))


def _measure(loaded: LoadedModel, data: Path, scratch: Path, work: Path) -> tuple[dict[str, Figure], dict[str, Any]]:
    spool = scratch / "spool.db"
    figures = {
        "marked_flagged_before": Figure(
            value=judge(shipped_bank_path(), spool=spool, spool_share=0.0), unit="texts", n=len(TEXTS)
        )
    }
    detail: dict[str, Any] = {"marked": mark_all(spool), "domain": DOMAIN}
    held_by = {"own": [], "data": corpus(data, scratch)}
    for name, files in held_by.items():
        found = refresh_bank(
            shipped_bank_path(),
            spool=spool,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            out=work,
            report=lambda *progress: print(*progress, flush=True),
            data=files,
            dev=[data / "dev.jsonl.gz"],
        )
        figures |= figures_of(name, found, judge(found.folder))
        parts = ("fixed", "fresh", "problems", "heads")
        detail[name] = {key: found.report[key] for key in parts}
    return figures, detail


if __name__ == "__main__":
    main()
