"""SAELens folders (`cfg.json` + `sae_weights.safetensors`): the native form in which a whole SAE is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from feature_bank.atomic import atomic_folder
from feature_bank.errors import BankError
from feature_bank.sae import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# SAELens rewrites configurations older than 6.0.0 on load; ours are written in the current form.
SAE_LENS_VERSION = "6.0.0"
_TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
# What a field must be for the tensors to mean what `SAE` says.
_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "architecture": (("jumprelu",), "only 'jumprelu' is"),
    "normalize_activations": (("none", None), "fold the normalisation into the weights first"),
    "reshape_activations": (("none", None), "only activations that need no reshaping are"),
}


def save_saelens(sae: SAE, folder: Path, *, model_name: str, metadata: dict[str, Any] | None = None) -> None:
    """Write `sae` as a SAELens JumpReLU folder, atomically; an existing folder is replaced."""
    cfg = {
        "architecture": "jumprelu",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "model_name": model_name,
            "hook_name": sae.hook_name,
            "hook_head_index": None,
            "prepend_bos": True,
            **(metadata or {}),
        },
    }
    tensors = {name: getattr(sae, name).detach().cpu().contiguous() for name in _TENSORS}
    with atomic_folder(folder) as tmp:
        save_file(tensors, tmp / WEIGHTS_FILE)
        (tmp / CONFIG_FILE).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


def load_saelens(folder: Path) -> SAE:
    """Read a SAELens folder of architecture `jumprelu` (the form in which BatchTopK SAEs are exported too).

    Raises BankError naming the file and field for anything missing, malformed or unsupported.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    cfg = _read_config(config_path)
    tensors = _read_tensors(weights_path)
    metadata = cfg.get("metadata")
    hook_name = metadata.get("hook_name") if isinstance(metadata, dict) else None
    if not isinstance(hook_name, str):
        raise BankError("missing", file=str(config_path), field="metadata.hook_name")
    subtract = cfg.get("apply_b_dec_to_input", True)
    if not isinstance(subtract, bool):
        raise BankError(f"{subtract!r} is neither true nor false", file=str(config_path), field="apply_b_dec_to_input")
    try:
        sae = SAE(**tensors, hook_name=hook_name, apply_b_dec_to_input=subtract)
    except BankError as e:
        raise BankError(e.message, file=str(weights_path), field=e.field) from e
    for field in ("d_in", "d_sae"):
        if cfg.get(field, getattr(sae, field)) != getattr(sae, field):
            raise BankError(
                f"{cfg[field]!r} is not that of the weights, {getattr(sae, field)}",
                file=str(config_path),
                field=field,
            )
    return sae


def _read_config(path: Path) -> dict[str, Any]:
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise BankError(f"{e.strerror}; a SAELens folder holds {CONFIG_FILE} and {WEIGHTS_FILE}", file=str(path)) from e
    except ValueError as e:
        raise BankError(f"is not valid JSON: {e}", file=str(path)) from e
    if not isinstance(cfg, dict):
        raise BankError("must hold a JSON object", file=str(path))
    for field, (values, hint) in _SUPPORTED.items():
        if cfg.get(field) not in values:
            raise BankError(f"{cfg.get(field)!r} is not supported; {hint}", file=str(path), field=field)
    return cfg


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except OSError as e:
        raise BankError(
            f"{e.strerror or e}; a SAELens folder holds {CONFIG_FILE} and {WEIGHTS_FILE}", file=str(path)
        ) from e
    except (ValueError, SafetensorError) as e:
        raise BankError(f"unreadable: {e}", file=str(path)) from e
    for name in _TENSORS:
        if name not in tensors:
            raise BankError("the tensor is missing", file=str(path), field=name)
        if not tensors[name].is_floating_point():
            raise BankError(f"dtype {tensors[name].dtype} is no floating point", file=str(path), field=name)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise BankError("the tensor holds NaN or infinity", file=str(path), field=name)
    return {name: tensors[name] for name in _TENSORS}
