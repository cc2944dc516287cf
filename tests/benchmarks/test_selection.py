"""The selection benchmark: its correlations are what they say, and its page says what its result says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks import selection, tables
from benchmarks.correlation import rank_correlation, within_groups
from benchmarks.results import read_result, write_result
from feature_bank.errors import DataError
from tests.training.selection_samples import entry, make_texts, random_firing
from training.ranking import Ranked
from training.selection import contrast_figures
from training.trainer import SaeRun, TrainedSae, TrainerConfig

GROUPS = ["a"] * 3 + ["b"] * 3 + ["c"] * 3


@pytest.mark.parametrize("seed", range(4))
def test_rho_is_scipys_and_the_p_of_a_permutation_is_near_its(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=12)
    y = x + generator.normal(size=12)
    x[3] = x[4]  # a tie
    found, expected = rank_correlation(x, y), spearmanr(x, y)
    assert found["rho"] == pytest.approx(expected.statistic, abs=1e-4)
    assert found["p"] == pytest.approx(expected.pvalue, abs=0.03)
    assert found["interval"][0] <= found["rho"] <= found["interval"][1]


def test_perfect_agreement_reversal_and_nothing() -> None:
    x = np.arange(9.0)
    assert rank_correlation(x, x**3)["rho"] == 1
    assert rank_correlation(x, -x)["rho"] == -1
    assert rank_correlation(x, x)["p"] < 0.001
    assert rank_correlation(x, np.ones(9)) == {"rho": 0.0, "p": 1.0, "interval": [0.0, 0.0]}
    with pytest.raises(ValueError, match="three pairs"):
        rank_correlation([1.0, 2.0], [1.0, 2.0])


def test_within_groups_the_groups_own_levels_do_not_count() -> None:
    level = np.repeat([0.0, 10.0, 20.0], 3)
    inside = np.tile([0.0, 1.0, 2.0], 3)
    assert rank_correlation(level + inside, level - inside)["rho"] > 0.7
    found = rank_correlation(
        within_groups(level + inside, GROUPS), within_groups(level - inside, GROUPS), groups=GROUPS
    )
    assert found["rho"] == -1
    # 6^3 orders within three groups of three, of which one agrees and one is the reverse
    assert found["p"] == pytest.approx(2 / 216, abs=0.004)


def some_result() -> tuple[list[Ranked], dict[str, TrainedSae], dict[str, Any]]:
    texts = make_texts()
    ranked, trained, detected = [], {}, {}
    for number in range(6):
        name = f"blocks.{number // 3}.hook_resid_post/k{number}"
        figures = contrast_figures(random_firing(texts, seed=number), texts, permutations=20)
        ranked.append(entry(figures, name, layer=number // 3))
        run = SaeRun(f"blocks.{number // 3}.hook_resid_post", TrainerConfig(), name=name)
        trained[name] = TrainedSae(run, Path("nowhere"), {"fvu": 0.1 * number, "l0": 10.0 - number})
        detected[name] = {part: {"politics": 0.9 - 0.01 * number, "terror": 0.8} for part in selection.PARTS}
    return sorted(ranked, key=lambda r: -r.separation), trained, detected


def test_every_correlation_is_that_of_the_figures_with_the_aurocs() -> None:
    ranked, trained, detected = some_result()
    figures, detail = selection.summarise(ranked, trained, detected)
    assert figures["spearman_reconstruction_dev"].value == 1
    assert figures["spearman_l0_dev_politics"].value == 1
    assert figures["spearman_l0_dev_terror"].value == 0
    metric = [e.domains["politics"].separation.margin for e in ranked]
    quality = [detected[e.name]["dev"]["politics"] for e in ranked]
    expected = spearmanr(metric, quality).statistic
    assert figures["spearman_separation_dev_politics"].value == pytest.approx(expected, abs=1e-4)
    assert detail["picks"]["reconstruction"]["dev"]["sae"].endswith("/k0")
    assert figures["picked_auroc_dev_l0"].value == figures["best_auroc_dev"].value
    assert [sae["rank"] for sae in detail["saes"]] == list(range(1, 7))


def test_the_page_shows_the_result_and_a_trial_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, detail = selection.summarise(*some_result())
    about = {"model": "tiny", "tokens": 1000, "features": 64, "dev_rows": 10, "limit": 5}
    path = write_result("selection", figures, {**detail, **about}, folder=tmp_path)
    _, text = tables.page("selection", path.parent)
    assert "the figures mean nothing" in text
    for sae in read_result(path).detail["saes"]:
        assert f"`{sae['name']}`" in text
    for title in selection.METRICS.values():
        assert f"| {title} |" in text


def test_a_trial_is_not_published_and_a_run_needs_its_work_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["--limit", "5"], "--out"), ([], "--work")):
        with pytest.raises(SystemExit):
            selection.main(["--data", "nowhere", *words])
        assert message in capsys.readouterr().err


def test_rows_that_are_missing_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fit\.jsonl\.gz"):
        selection.read_all(tmp_path, 5)
