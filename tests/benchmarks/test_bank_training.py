"""A run's log is read as it was said, and what is no such log is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bank_training import read_log, stage_seconds, train
from feature_bank.errors import DataError

LOG = """\
      8 s  corpus: 12 documents, 345 tokens
     41 s  harvest 1/2: 200 tokens
     70 s  harvest: 345 tokens
     90 s  sae blocks.0.hook_resid_post 1/2: fvu 0.5, l0 2, dead 0.0%
     95 s  sae blocks.0.hook_resid_post: fvu 0.4, l0 2, dead 0.0%
    101 s  sae blocks.1.hook_resid_post: fvu 0.4, l0 2, dead 0.0%
    110 s  candidates: terror: 3 features
    120 s  candidates: 9 features to describe
\tElapsed (wall clock) time (h:mm:ss or m:ss): 2:05.50
\tMaximum resident set size (kbytes): 2000000
"""


def test_a_stage_lasts_from_the_end_of_the_one_before_to_its_own() -> None:
    assert stage_seconds(LOG.splitlines()) == {"corpus": 8, "harvest": 62, "sae": 31, "candidates": 19}


@pytest.mark.parametrize(("clock", "seconds"), [("2:05.50", 125.5), ("1:02:05", 3725.0)])
def test_time_and_memory_are_those_of_gnu_time(tmp_path: Path, clock: str, seconds: float) -> None:
    (tmp_path / "log").write_text(LOG.replace("2:05.50", clock))
    run = read_log(tmp_path / "log")
    assert (run.seconds, run.peak_gb) == (seconds, 2.048)


def test_a_log_without_stages_or_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no stage has ended"):
        stage_seconds(["     41 s  harvest 1/2: 200 tokens"])
    (tmp_path / "log").write_text(LOG.partition("\tElapsed")[0])
    with pytest.raises(DataError, match="time -v"):
        read_log(tmp_path / "log")


def test_a_run_that_would_go_on_from_an_earlier_one_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "bank.work").mkdir()
    with pytest.raises(DataError, match="would not start from nothing"):
        train(tmp_path, tmp_path / "bank")
