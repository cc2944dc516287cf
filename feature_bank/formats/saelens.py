"""SAELens folders (`cfg.json` + `sae_weights.safetensors`): the native form in which a whole SAE is kept.

Written are `standard`, `topk`, `jumprelu` and the transcoder architectures of SAELens 6; a Gated SAE has been folded
into JumpReLU, which gives the same activations. SAELens has no TopK transcoder: those are written as
`topk_transcoder` and `topk_skip_transcoder`, which it refuses and this module reads. Read are those, `gated`, the
checkpoints of a BatchTopK training, and configurations from before SAELens 6.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from feature_bank.atomic import atomic_folder
from feature_bank.errors import BankError
from feature_bank.formats.files import JsonFile, TensorFile, same_dtype
from feature_bank.formats.folding import fold_decoder_norm, fold_scales
from feature_bank.formats.saelens_config import SAELensConfig, architecture_of
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE, fold_gated

__all__ = ["CONFIG_FILE", "FORMAT", "WEIGHTS_FILE", "load_saelens", "save_saelens"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# SAELens rewrites configurations older than 6.0.0 on load; ours are written in the current form.
SAE_LENS_VERSION = "6.0.0"
# Under this key of the metadata stands what only sailguard knows; SAELens keeps it and looks away.
OWN_METADATA = "sailguard"
_HINT = f"a SAELens folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
_UNUSED = ("finetuning_scaling_factor", "scaling_factor")  # old SAEs carry them, and use them only if cfg says so


def save_saelens(sae: SAE, folder: Path, *, model_name: str, metadata: dict[str, Any] | None = None) -> None:
    """Write `sae` as a SAELens folder, atomically; an existing folder is replaced.

    Raises BankError naming the field if SAELens' architectures cannot hold it, or if the files cannot be written;
    then what stood in `folder` is left as it was.
    """
    architecture = architecture_of(sae)
    names = _tensor_names(sae)
    tensors = dict(zip(names, same_dtype(*(getattr(sae, name) for name in names)), strict=True))
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T  # SAELens keeps it as (d_out, d_in)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if sae.k is not None:
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    if sae.is_transcoder:
        cfg["d_out"] = sae.d_out
    cfg["metadata"] = {
        "sae_lens_version": SAE_LENS_VERSION,
        "model_name": model_name,
        "hook_name": sae.hook_name,
        "hook_head_index": None,
        "prepend_bos": True,
        **(metadata or {}),
    }
    if sae.is_transcoder:
        cfg["metadata"]["hook_name_out"] = sae.hook_name_out
    if sae.encoder_only:
        cfg["metadata"][OWN_METADATA] = {**cfg["metadata"].get(OWN_METADATA, {}), "encoder_only": True}
    try:
        with atomic_folder(folder) as tmp:
            save_file(tensors, tmp / WEIGHTS_FILE)
            (tmp / CONFIG_FILE).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise BankError(f"cannot be written: {reason}; what stood there was left as it was", file=str(folder)) from e


def load_saelens(folder: Path) -> SAE:
    """Read a SAELens folder.

    Raises BankError naming the file and field for anything missing, malformed or unsupported.
    """
    return _read(folder, SourceOptions()).sae


def _tensor_names(sae: SAE) -> list[str]:
    names = ["W_enc", "W_dec", "b_enc", "b_dec"]
    if architecture_of(sae).startswith("jumprelu"):
        names.append("threshold")
    if sae.W_skip is not None:
        names.append("W_skip")
    return names


def _matches(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG_FILE).exists() and not (path / "sae.safetensors").exists()
    return path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).exists()


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    folder = path.parent if path.name == WEIGHTS_FILE else path
    config = SAELensConfig.read(JsonFile(folder / CONFIG_FILE, hint=_HINT), options)
    weights = TensorFile.safetensors(folder / WEIGHTS_FILE, hint=_HINT)
    W_enc = weights.take("W_enc", ("d_in", "d_sae"))
    d_in, d_sae = W_enc.shape
    W_dec = weights.take("W_dec", (d_sae, "d_out" if config.is_transcoder else d_in))
    tensors = _activation(config, weights, W_enc, W_dec)
    tensors["b_dec"] = weights.take("b_dec", (W_dec.shape[1],))
    if config.has_skip:
        tensors["W_skip"] = weights.take("W_skip", (W_dec.shape[1], d_in)).T.contiguous()
    if config.scales_features:
        factor = weights.take("finetuning_scaling_factor", (d_sae,))
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]
    weights.drop(_UNUSED)
    weights.finish()
    config.check_sizes(d_in, d_sae, W_dec.shape[1])
    sae = SAE(
        **dict(zip(tensors, same_dtype(*tensors.values()), strict=True)),
        hook_name=config.hook_name,
        hook_name_out=config.hook_name_out,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        k=config.k if config.per_token_top_k else None,
        encoder_only=config.encoder_only,
    )
    if config.norm_factor is not None:
        sae = fold_scales(sae, config.norm_factor, config.norm_factor)
    return LoadedSAE(
        sae=sae,
        format=FORMAT.name,
        weights=weights.path,
        model_name=config.model_name,
        notes=tuple(config.notes),
    )


def _activation(config: SAELensConfig, weights: TensorFile, W_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
    """The tensors of the encoder and decoder, with what the architecture does besides folded in."""
    d_sae = (W_enc.shape[1],)
    if config.architecture == "gated":
        b_gate, b_mag, r_mag = (weights.take(name, d_sae) for name in ("b_gate", "b_mag", "r_mag"))
        W_enc, b_enc, threshold = fold_gated(W_enc, b_gate, b_mag, r_mag)
        config.notes.append("The gate was folded into a JumpReLU threshold, which gives the same activations.")
        return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "threshold": threshold}
    b_enc = weights.take("b_enc", d_sae)
    if config.rescales:
        W_enc, b_enc, W_dec = fold_decoder_norm(W_enc, b_enc, W_dec)
        config.notes.append("The decoder rows' norms were folded into the encoder.")
    if config.architecture.startswith("jumprelu"):
        # SAELens cuts at zero as well, so a negative threshold is one of zero.
        old = "threshold" not in weights and "log_threshold" in weights  # training checkpoints once held the logarithm
        threshold = weights.take("log_threshold", d_sae).exp() if old else weights.take("threshold", d_sae).clamp_min(0)
    elif config.architecture in ("batchtopk", "matryoshka_batchtopk"):
        threshold = torch.full(d_sae, max(weights.take_number("topk_threshold"), 0.0), dtype=W_enc.dtype)
        config.notes.append("A training checkpoint: its running BatchTopK threshold became a JumpReLU threshold.")
    else:
        threshold = torch.zeros_like(b_enc)
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "threshold": threshold}


FORMAT = Format(
    name="saelens",
    matches=_matches,
    read=_read,
    options=frozenset({"norm_factor", "hook_name_out"}),
)
