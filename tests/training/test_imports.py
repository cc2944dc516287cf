"""Others' tags and the rows of their encoders become a bank that the guard loads and that claims what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from feature_bank.errors import BankError, DataError
from feature_bank.formats import LoadedSAE, SourceOptions, read_source
from feature_bank.identity import identify
from feature_bank.interop.collection import Collection
from feature_bank.interop.safe_sail_db import SCORE, read_safe_sail
from guard import Guard
from guard.capture import truncated_forward
from tests.factories import CANARY, POOLING, make_policy
from tests.feature_bank.formats.samples import write_torch
from tests.feature_bank.interop.samples import write_database
from training.corpus import read_documents
from training.imports import Joined, join_collection, joinable
from training.pipeline import Preset
from training.row_form import row_form

WIDTH, D_SAE, STACKED = 32, 24, 2
LAYERS = (1, 2)
HOOKS = tuple(f"blocks.{layer}.hook_mlp_out" for layer in LAYERS)
POLITICS = ["BALLOT", "SENATE", "QUORUM", "TREATY", "DECREE", "LOBBY"]
OTHERS = ["river", "garden", "kettle", "window", "pillow", "bread"]
PRESET = Preset(
    name="tiny", version="1", hook_points=HOOKS, labelled_tokens=60, pooling=POOLING, canary=CANARY, own_corpora=False
)
READS, READS_OPPOSITE = (3, 5), 7  # features of the made-up SAEs that tell the texts apart, and one the wrong way round
TAGS = {
    "1_3": (["politics"], 0.4),
    "1_7": (["politics"], 0.6),  # a high score is no proof
    "1_9": (["violence"], 0.3),
    "1_30": (["politics"], 0.5),  # outside the SAE
    "2_3": (["politics", "violence"], 0.5),
    "2_5": (["politics"], 0.1),
    "2_11": ([], 0.5),
    "4_1": (["politics"], 0.5),  # no SAE of its layer
}


class Workshop(NamedTuple):
    """What a run needs, bound to one folder of inputs."""

    model: Any
    tokenizer: Any
    collection: Collection
    folder: Path
    texts: Path

    def saes(self, *, k: int | None = None) -> list[LoadedSAE]:
        kind = "topk" if k else "jumprelu"
        options = SourceOptions(index=1, k=k)
        return [read_source(self.folder / kind / f"ckpt_layer{layer}.pt", options) for layer in LAYERS]

    def join(self, out: Path, *, saes: list[LoadedSAE] | None = None, texts: Path | None = None, **more: Any) -> Joined:
        documents, corpora = read_documents([texts or self.texts])
        return join_collection(
            more.pop("collection", self.collection),
            saes or self.saes(),
            model=self.model,
            tokenizer=self.tokenizer,
            identity=identify(self.model, self.tokenizer, "tiny-qwen2"),
            preset=PRESET,
            documents=documents,
            corpora=corpora,
            name="tiny-sail",
            out=out,
            work=out.with_name(f"{out.name}.work"),
            score=SCORE,
            **more,
        )


def rows(known: list[str]) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for i in range(240):
        positive = i % 2 == 0
        text = " ".join(generator.choice(POLITICS if positive else OTHERS, 6).tolist())
        found.append(
            {
                "id": f"row{i}",
                "text": f"{text} {i}",
                "domains": ["politics"] if positive and known else [],
                "known": known,
                "licence": "CC0-1.0",
            }
        )
    return found


def checkpoint(model: Any, tokenizer: Any, hook: str, *, theta: bool) -> dict[str, Tensor]:
    """Stacked encoders; in the second, some features read what the words of politics leave at the hook point."""

    def mean(words: list[str]) -> Tensor:
        ids = torch.tensor([tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]])
        return truncated_forward(model, [hook], ids)[hook][0, 1:].double().mean(0)

    positive, negative = mean(POLITICS), mean(OTHERS)
    reads = (positive - negative) / (positive - negative).norm()
    generator = torch.Generator().manual_seed(3)
    centre = ((positive + negative) / 2).float()
    weight = torch.randn(STACKED, D_SAE, WIDTH, generator=generator)
    weight /= weight.norm(dim=2, keepdim=True)
    for feature in READS:
        weight[1, feature] = reads.float() * 1.5
    weight[1, READS_OPPOSITE] = -reads.float() * 1.5
    tensors = {
        "pre_encoder_bias._bias_reference": centre.expand(STACKED, WIDTH).clone(),
        "encoder.weight": weight,
        "encoder.bias": torch.zeros(STACKED, D_SAE),
    }
    spread = float((positive - negative).norm()) * 0.1
    return tensors | ({"encoder.theta": torch.full((STACKED, D_SAE), spread)} if theta else {})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Workshop:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=260,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).float().eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("sail")
    for layer, hook in zip(LAYERS, HOOKS, strict=True):
        for kind in ("jumprelu", "topk"):
            tensors = checkpoint(model, tiny_tokenizer, hook, theta=kind == "jumprelu")
            write_torch(folder / kind / f"ckpt_layer{layer}.pt", tensors)
    database = {
        key: {"explanation": "***" if key == "1_3" else f"made-up {key}", "correlation_score": score, "tag_list": tags}
        for key, (tags, score) in TAGS.items()
    }
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows(["politics"])))
    collection = read_safe_sail(write_database(folder / "db.json", database))
    return Workshop(model, tiny_tokenizer, collection, folder, texts)


@pytest.fixture(scope="module")
def joined(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Joined:
    return workshop.join(tmp_path_factory.mktemp("bank") / "bank")


def test_only_features_with_rows_enter_and_the_rest_is_counted(joined: Joined) -> None:
    assert [f.id for f in joined.bank.features] == ["L1/3", "L1/7", "L1/9", "L2/3", "L2/5"]
    assert joined.left_out == {
        "no SAE of its layer was given": 1,
        "its index lies outside the SAE": 1,
        "it carries no domain's tag": 1,
    }


def test_a_tag_counts_only_if_the_feature_tells_the_domain_apart(joined: Joined) -> None:
    head = joined.bank.heads["politics"]
    assert head.features == ["L1/3", "L2/3"]
    assert head.weights == [1.0, 1.0]
    wrong = joined.bank.by_id["L1/7"]
    assert wrong.scores["auroc_politics"] < 0.5 < joined.bank.by_id["L1/3"].scores["auroc_politics_low"]
    assert (wrong.admitted, wrong.refusals) == (False, ["it does not tell its domain apart on labelled text"])
    low = joined.bank.by_id["L2/5"]
    assert (low.admitted, low.refusals) == (False, [f"{SCORE} is below 0.2"])
    assert joined.bank.by_id["L1/3"].admitted


def test_a_domain_without_labels_is_said_to_be_uncalibrated(joined: Joined) -> None:
    assert joined.bank.heads["violence"].features == ["L1/9", "L2/3"]
    quality = joined.bank.manifest.quality
    assert (quality["calibrated_politics"], quality["calibrated_violence"]) == (1.0, 0.0)
    assert quality["test_auroc_politics"] > 0.9
    assert any("violence: too few labels" in note for note in joined.notes)
    assert set(joined.bank.heads) == {"politics", "violence"}


def test_what_was_published_stays_and_what_was_not_is_not_made_up(joined: Joined) -> None:
    masked = joined.bank.by_id["L1/3"]
    assert masked.explanation == "***"
    assert masked.scores[SCORE] == 0.4
    assert masked.fidelity == []
    assert {c.licence for c in joined.bank.manifest.corpus} == {"CC0-1.0", "MIT"}
    for hook in joined.bank.manifest.hook_points:
        assert (hook.fires_precision, hook.fires_recall, hook.fvu) == (1.0, 1.0, 1.0)


def test_without_a_decoder_nothing_can_steer(joined: Joined) -> None:
    assert all(not rows.W_dec.any() for rows in joined.bank.rows.values())
    assert all(value == 0 for head in joined.bank.heads.values() for value in head.steering)
    assert any("never steered" in note for note in joined.notes)


@pytest.mark.parametrize("k", [None, 6])
def test_the_guard_loads_the_bank_generates_and_flags(workshop: Workshop, tmp_path: Path, k: int | None) -> None:
    workshop.join(tmp_path / "bank", saes=workshop.saes(k=k))
    rule = {"domain": "politics", "action": "flag", "threshold": {"fpr": 0.05}}
    guard = Guard.from_bank(tmp_path / "bank", policy=make_policy(rule))
    with guard.attach(workshop.model, workshop.tokenizer) as attached:
        reports = {}
        for name, words in (("politics", POLITICS), ("others", OTHERS)):
            events = list(attached.stream([{"role": "user", "content": " ".join(words * 2)}], max_new_tokens=4))
            assert events[-1].finish_reason is not None
            reports[name] = attached.reports[0]
    assert [v.domain for v in reports["politics"].verdicts if v.phase == "prompt"] == ["politics"]
    assert {hit.id for v in reports["politics"].verdicts for hit in v.features} <= {"L1/3", "L2/3"}
    assert not [v for v in reports["others"].verdicts if v.phase == "prompt"]
    assert all(report.tokens_observed == report.tokens_generated > 0 for report in reports.values())


def test_rows_of_a_topk_encoder_fire_where_it_fires(workshop: Workshop) -> None:
    (source, _) = workshop.saes(k=6)
    x = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.05
    form = row_form(source.sae, x, [3, 9, 20])
    assert form.sae.k is None
    assert form.l0 <= 6
    full = source.sae.encode(x)[:, [3, 9, 20]] > 0
    rows_fire = form.sae.select([3, 9, 20]).encode(x) > 0
    assert torch.allclose(full.float().mean(0), rows_fire.float().mean(0), atol=0.03)
    assert form.fires_precision > 0.5
    assert form.fires_recall > 0.5
    exact = row_form(replace(source.sae, k=None), x, [3])
    assert (exact.fires_precision, exact.fires_recall) == (1.0, 1.0)


def test_an_encoder_that_never_fires_gets_rows_that_never_fire(workshop: Workshop) -> None:
    (source, _) = workshop.saes(k=1)
    silent = replace(source.sae, b_enc=source.sae.b_enc.clone())
    silent.b_enc[3] = -100.0
    x = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(1))
    assert not bool((row_form(silent, x, [3]).sae.select([3]).encode(x) > 0).any())


def test_the_same_inputs_give_the_same_bank_and_the_work_is_taken_up(
    workshop: Workshop, joined: Joined, tmp_path: Path
) -> None:
    seen: list[str] = []
    again = workshop.join(tmp_path / "bank", report=lambda stage, *_: seen.append(stage)).bank
    assert again.manifest.files == joined.bank.manifest.files
    assert dict.fromkeys(seen).keys() == {"harvest", "measure", "heads", "pack"}
    assert workshop.join(tmp_path / "bank").bank.manifest.files == again.manifest.files


def test_without_any_labels_every_tagged_feature_counts_and_the_bank_says_so(
    workshop: Workshop, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows([])))
    bank = workshop.join(tmp_path / "bank", texts=texts).bank
    assert bank.heads["politics"].features == ["L1/3", "L1/7", "L2/3"]
    assert bank.manifest.quality == {"calibrated_politics": 0.0, "calibrated_violence": 0.0}
    with Guard.from_bank(tmp_path / "bank", policy=make_policy({"domain": "politics", "action": "flag"})).attach(
        workshop.model, workshop.tokenizer
    ) as attached:
        texts_of = [row["text"] for row in rows([])]
        scores = [found.scores["politics"] for found in attached.score(texts_of, ["passage"] * len(texts_of))]
    assert 1 <= sum(score >= 0.5 for score in scores) <= 3  # one text in a hundred


def test_untagged_features_come_along_if_asked_but_into_no_head(workshop: Workshop, tmp_path: Path) -> None:
    found = workshop.join(tmp_path / "bank", untagged=True)
    assert found.bank.by_id["L2/11"].refusals == ["it carries no domain's tag"]
    assert "it carries no domain's tag" not in found.left_out


def alter(source: LoadedSAE, **changes: Any) -> LoadedSAE:
    return replace(source, sae=replace(source.sae, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saes: [saes[0], saes[0]], "two SAEs lie in layer 1"),
        (lambda saes: [alter(saes[0], hook_name="blocks.1.hook_resid_post")], "are of blocks.1.hook_mlp_out"),
        (lambda saes: [alter(saes[0], hook_name="blocks.0.hook_mlp_out")], "none of the 8 features has rows"),
        (
            lambda saes: [alter(saes[0], hook_name_out="blocks.1.hook_resid_post", apply_b_dec_to_input=False)],
            "is a transcoder",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(
    workshop: Workshop, change: Callable[[list[LoadedSAE]], list[LoadedSAE]], message: str
) -> None:
    with pytest.raises(BankError, match=message):
        joinable(workshop.collection, change(workshop.saes()))


def test_an_sae_of_another_width_is_refused_before_any_work(workshop: Workshop, tmp_path: Path) -> None:
    narrow = [alter(s, W_enc=s.sae.W_enc[:8], W_dec=s.sae.W_dec[:, :8], b_dec=s.sae.b_dec[:8]) for s in workshop.saes()]
    with pytest.raises(BankError, match="width of 32") as error:
        workshop.join(tmp_path / "bank", saes=narrow)
    assert error.value.field == "d_in"
    assert list(tmp_path.iterdir()) == []


def test_a_bank_without_a_head_is_not_written(workshop: Workshop, tmp_path: Path) -> None:
    only = replace(workshop.collection, features=(workshop.collection.by_id["L1/7"],))
    with pytest.raises(DataError, match="none of 1 tagged features tells it apart"):
        workshop.join(tmp_path / "bank", collection=only)
    assert not (tmp_path / "bank").exists()
