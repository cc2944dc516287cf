"""The bank's rows give what the whole SAE gives, divided by each feature's scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_bank.bank import Bank, Rows, save_bank
from feature_bank.sae import SAE
from feature_bank.schema import Heads
from guard.capture import truncated_forward
from guard.encoder import SelectedEncoder
from tests.factories import HOOKS, PER_HOOK, make_bank

D_SAE = 96


@pytest.fixture
def pair(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> tuple[Bank, dict[str, SAE], dict[str, list[int]]]:
    """A bank whose rows are cut from whole SAEs, those SAEs, and the indices of the cut."""
    draft = make_bank(tmp_path / "draft", tiny_model, tiny_tokenizer)
    d_in = tiny_model.config.hidden_size
    saes, indices, rows = {}, {}, {}
    for number, hook in enumerate(HOOKS):
        generator = torch.Generator().manual_seed(number)
        decoder = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=generator), dim=1)
        saes[hook] = SAE(
            W_enc=decoder.T.clone(),
            W_dec=decoder,
            b_enc=torch.randn(D_SAE, generator=generator) * 0.02,
            b_dec=torch.randn(d_in, generator=generator) * 0.02,
            threshold=torch.full((D_SAE,), 0.02),
            hook_name=hook,
        )
        indices[hook] = torch.randperm(D_SAE, generator=generator)[:PER_HOOK].tolist()
        cut = saes[hook].select(indices[hook])
        rows[hook] = Rows(**{n: getattr(cut, n).numpy() for n in ("W_enc", "W_dec", "b_enc", "threshold")})
    manifest = draft.manifest.model_dump(exclude={"schema_version", "files", "sha256"})
    bank = save_bank(
        tmp_path / "bank",
        manifest=manifest,
        features=draft.features,
        heads=Heads(pooling=draft.pooling, heads=draft.heads),  # type: ignore[arg-type]  # keys are domains
        rows=rows,
    )
    return bank, saes, indices


def test_selected_rows_agree_with_the_whole_sae(
    pair: tuple[Bank, dict[str, SAE], dict[str, list[int]]], tiny_model: Any
) -> None:
    bank, saes, indices = pair
    encoder = SelectedEncoder(bank, torch.device("cpu"))
    hidden = {k: v[0] for k, v in truncated_forward(tiny_model, HOOKS, torch.randint(3, 259, (1, 300))).items()}
    found = encoder.encode(hidden)
    assert found.shape == (300, 2 * PER_HOOK)
    scale = torch.tensor([f.scale for f in bank.features])
    for hook in HOOKS:
        columns = encoder.columns[hook]
        sae, chosen = saes[hook], indices[hook]
        whole = sae.encode(hidden[hook])[:, chosen]
        weight, bias = sae.folded_encoder()
        pre = (hidden[hook] @ weight + bias)[:, chosen]
        mine = found[:, columns] * scale[columns]
        tolerance = 2e-3 * hidden[hook].norm(dim=1, keepdim=True)  # of rows stored with 11 bits
        clear = (pre - 0.02).abs() > tolerance
        assert clear.float().mean() > 0.5
        assert 0.05 < (whole > 0).float().mean() < 0.95
        assert torch.equal((mine > 0)[clear], (whole > 0)[clear])
        assert ((mine - whole).abs() <= tolerance)[clear].all()
        assert torch.equal(encoder.read(hook, hidden[hook])[1], found[:, columns])


def test_columns_are_the_banks_features_in_order(pair: tuple[Bank, Any, Any]) -> None:
    bank = pair[0]
    encoder = SelectedEncoder(bank, torch.device("cpu"))
    for hook, columns in encoder.columns.items():
        assert {f.hook_name for f in bank.features[columns]} == {hook}
    assert encoder.n_features == len(bank.features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_model_dtype_is_encoded_in_float32(pair: tuple[Bank, Any, Any], dtype: torch.dtype) -> None:
    encoder = SelectedEncoder(pair[0], torch.device("cpu"))
    hidden = {hook: torch.randn(6, 32).to(dtype) for hook in HOOKS}
    found = encoder.encode(hidden)
    assert found.dtype == torch.float32
    assert torch.equal(found, encoder.encode({hook: h.float() for hook, h in hidden.items()}))


def test_nan_is_never_encoded_as_silence(pair: tuple[Bank, Any, Any]) -> None:
    encoder = SelectedEncoder(pair[0], torch.device("cpu"))
    found = encoder.encode({hook: torch.full((1, 32), np.nan) for hook in HOOKS})
    assert found.isnan().all()


def test_a_batch_of_rows_is_encoded_as_the_rows_alone(pair: tuple[Bank, Any, Any]) -> None:
    encoder = SelectedEncoder(pair[0], torch.device("cpu"))
    hidden = {hook: torch.randn(9, 32) for hook in HOOKS}
    alone = torch.cat([encoder.encode({hook: h[i : i + 1] for hook, h in hidden.items()}) for i in range(9)])
    torch.testing.assert_close(encoder.encode(hidden), alone, atol=1e-5, rtol=1e-5)
