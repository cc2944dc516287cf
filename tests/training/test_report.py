"""The written report: what is in the folder, that nothing in it runs or is fetched, and what its plots show."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file

from feature_bank.errors import DataError, MissingExtraError
from training.downstream import DownstreamQuality, SaeQuality
from training.quality import DensityHistogram, ReconstructionQuality
from training.report import ReportEntry, pareto_front, write_report

HOOK = "blocks.6.hook_resid_post"
EVIL = "<script>alert('x')</script>\"&$\\frac_{ \x1b[31m 鳥"


def entry(
    name: str = "a",
    *,
    l0: float = 32.0,
    fvu: float | None = 0.2,
    hook_name: str = HOOK,
    hook_name_out: str | None = None,
    series: str = "topk",
    downstream: bool = True,
    d_sae: int = 64,
) -> ReportEntry:
    """An SAE with made-up figures; the better its fvu, the more loss it recovers."""
    generator = np.random.default_rng(len(name))
    density = generator.random(d_sae) ** 4
    density[:5] = 0.0
    reconstruction = ReconstructionQuality(
        tokens=1000,
        outlier_tokens=2,
        explained_variance=None if fvu is None else 1 - fvu,
        explained_variance_legacy=None,
        fvu=fvu,
        mse=123.4,
        cossim=0.9,
        l2_norm_in=100.0,
        l2_norm_out=97.0,
        l2_ratio=0.97,
        relative_reconstruction_bias=0.99,
        l0=l0,
        l1=210.0,
        frac_alive=1 - 5 / d_sae,
        dead_fraction=5 / d_sae,
        freq_over_1_percent=0.5,
        freq_over_10_percent=0.1,
        feature_density=density,
        density_histogram=DensityHistogram.of(density),
    )
    spliced = DownstreamQuality(
        ablation="zero",
        splice_at="content",
        ce_tokens=990,
        kl_tokens=1000,
        ce_loss_without_sae=3.0,
        ce_loss_with_sae=3.0 + (fvu or 0.0),
        ce_loss_with_ablation=11.0,
        kl_div_with_sae=0.1,
        kl_div_with_ablation=8.0,
    )
    return ReportEntry(
        quality=SaeQuality(
            name=name,
            hook_name=hook_name,
            hook_name_out=hook_name_out,
            d_in=16,
            d_sae=d_sae,
            reconstruction=reconstruction,
            downstream=spliced if downstream else None,
        ),
        series=series,
    )


def sweep() -> list[ReportEntry]:
    found = [
        entry(f"{hook}/{series}-{l0}", l0=l0, fvu=offset + 2 / l0, hook_name=hook, series=series)
        for hook in (HOOK, "blocks.14.hook_resid_post")
        for series, offset in (("topk", 0.1), ("relu", 0.2))
        for l0 in (16.0, 32.0, 64.0)
    ]
    return [*found, entry("t", hook_name="blocks.6.hook_resid_pre", hook_name_out="blocks.6.hook_mlp_out")]


def write(folder: Path, entries: Sequence[ReportEntry], **options: Any) -> Path:
    return write_report(folder, entries, title=options.pop("title", "Quality"), **options)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the sweep with its plots, which take a few seconds."""
    return write(tmp_path_factory.mktemp("sweep") / "report", sweep(), provenance={"model": "tiny"}).parent


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are empty files, for tests of everything else."""

    def draw(*arguments: Any) -> None:
        stem = arguments[-1]
        for kind in ("png", "svg"):
            stem.with_name(f"{stem.name}.{kind}").write_bytes(b"")

    for name in ("save_tradeoff", "save_densities"):
        monkeypatch.setattr(f"training.report.{name}", draw)


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_holds_the_page_its_plots_and_the_figures(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    plots = {"l0_fvu", "l0_ce_loss_recovered", "feature_density"}
    assert names == {
        "report.html",
        "report.json",
        "feature_density.safetensors",
        *(f"{plot}.{kind}" for plot in plots for kind in ("png", "svg")),
    }


def test_the_json_holds_every_figure_and_the_densities_are_those_of_each_feature(report: Path) -> None:
    record = json.loads((report / "report.json").read_text())
    assert record["schema_version"] == 1
    assert record["provenance"] == {"model": "tiny"}
    densities = load_file(report / "feature_density.safetensors")
    for found, made in zip(record["saes"], sweep(), strict=True):
        figures = json.loads(json.dumps(made.quality.to_dict()))
        assert {name: found[name] for name in figures} == figures
        assert found["series"] == made.series
        assert sum(found["density_histogram"]["counts"]) + found["density_histogram"]["dead"] == 64
        np.testing.assert_array_equal(
            densities[made.quality.name], made.quality.reconstruction.feature_density, strict=True
        )


@pytest.mark.parametrize(
    "entries", [[entry(EVIL)], [entry(EVIL, series=EVIL), entry("b")], [entry(EVIL), *map(entry, "bcdef")]]
)
def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path, entries: list[ReportEntry]) -> None:
    path = write(tmp_path / "report", entries, title=EVIL, provenance={EVIL: EVIL})
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "a", "base", "svg"}
    attributes = [(name, value or "") for _, attrs in page.tags for name, value in attrs.items()]
    assert all(value.startswith("data:image/svg+xml;base64,") for name, value in attributes if name == "src")
    assert not [name for name, _ in attributes if name.startswith("on") or name == "href"]
    assert "http://" not in text
    assert "https://" not in text
    policy = next(attrs["content"] for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert page.text.count("<script>alert('x')</script>") >= 3  # the title, the provenance and the name, as text


def test_plots_are_sound_images_without_foreign_content(report: Path) -> None:
    for path in report.glob("*.png"):
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", header[16:24])
        assert 600 < width < 3000
        assert 300 < height < 3000
    for path in report.glob("*.svg"):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
        for element in root.iter():
            assert element.tag.rpartition("}")[2] not in {"script", "foreignObject"}
            links = [value for name, value in element.attrib.items() if name.rpartition("}")[2] == "href"]
            assert all(link.startswith(("#", "data:")) for link in links)


def test_a_report_of_the_same_figures_is_the_same_byte_for_byte(report: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again", sweep(), provenance={"model": "tiny"}).parent
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in report.iterdir()}


@pytest.mark.usefixtures("undrawn")
def test_a_single_sae_has_its_figures_with_their_meanings_and_no_tradeoff(tmp_path: Path) -> None:
    folder = write(tmp_path / "report", [entry()]).parent
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for name in ("fvu", "explained_variance", "ce_loss_recovered", "kl_div_with_sae", "relative_reconstruction_bias"):
        assert name in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert not (folder / "l0_fvu.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_saes_that_no_hook_point_has_in_common_are_not_plotted_against_each_other(tmp_path: Path) -> None:
    folder = write(tmp_path / "report", [entry("a"), entry("b", hook_name="blocks.14.hook_resid_post")]).parent
    assert not (folder / "l0_fvu.png").exists()
    assert (folder / "feature_density.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_figures_that_are_missing_are_shown_as_missing(tmp_path: Path) -> None:
    entries = [entry("a", fvu=None, downstream=False), entry("b", l0=0.0, downstream=False)]
    folder = write(tmp_path / "report", entries).parent
    record = json.loads((folder / "report.json").read_text())
    assert record["saes"][0]["fvu"] is None
    assert "ce_loss_recovered" not in record["saes"][0]
    assert not (folder / "l0_fvu.png").exists()
    assert (folder / "feature_density.png").exists()


# The Pareto front


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto_front([(16, 0.4), (32, 0.3), (32, 0.35), (64, 0.3), (64, 0.2)]) == [True, True, False, False, True]
    assert pareto_front([(1, 1), (1, 1)]) == [True, True]


def test_the_front_is_that_of_a_hook_point(report: Path) -> None:
    record = json.loads((report / "report.json").read_text())
    for sae in record["saes"]:
        expected = ["fvu", "ce_loss_recovered"] if sae["series"] == "topk" and sae["name"] != "t" else []
        assert sae["pareto"] == expected, sae["name"]


# What must not happen


@pytest.mark.usefixtures("undrawn")
def test_another_folder_is_not_replaced_and_an_earlier_report_is(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="something else"):
        write(folder, [entry()])
    assert (folder / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match="a file"):
        write(folder / "thesis.tex", [entry()])
    write(tmp_path / "report", sweep())
    write(tmp_path / "report", [entry()])
    assert not (tmp_path / "report" / "l0_fvu.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_entries_without_a_name_of_their_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no SAE"):
        write(tmp_path / "report", [])
    with pytest.raises(DataError, match="named 'a'"):
        write(tmp_path / "report", [entry("a"), entry("b"), entry("a")])
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=re.escape("sailguard[train]")):
        write(tmp_path / "report", [entry()])
    assert not (tmp_path / "report").exists()


def test_plotting_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before, loaded = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    matplotlib.rcParams["axes.titlesize"] = 31  # a user's own setting
    try:
        write(tmp_path / "report", [entry("a"), entry("b", fvu=0.3)])
        assert matplotlib.rcParams.copy() == {**before.copy(), "axes.titlesize": 31.0}
    finally:
        matplotlib.rcParams["axes.titlesize"] = before["axes.titlesize"]
    assert ("matplotlib.pyplot" in sys.modules) == loaded  # it would open windows and keep figures
