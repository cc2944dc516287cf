"""Gemma Scope: `params.npz` (the first, with `W_enc`...) or `params.safetensors` (the second, with `w_enc`...).

JumpReLU; b_dec is not subtracted from the input. The files of the first do not name their hook point, and those of the
second may have a `config.json` that does; otherwise it is told from the folders' names.
"""

from __future__ import annotations

import re
from pathlib import Path

from feature_bank.errors import BankError
from feature_bank.formats.files import JsonFile, TensorFile, same_dtype
from feature_bank.formats.hook_names import choose_hook, layer_in
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE

__all__ = ["FORMAT"]

CONFIG_FILE = "config.json"
_FILES = ("params.npz", "params.safetensors")
_PATHS = {
    "output": "hook_resid_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
}
# How the folders of a site are named: those of the repositories, and those within them.
_SITES = (
    (r"^resid_post(_all)?$|gemma-scope.*-res(-|$)", "hook_resid_post"),
    (r"^mlp_out(_all)?$|gemma-scope.*-mlp(-|$)", "hook_mlp_out"),
)
_TRANSCODER = r"^transcoder(_all)?$|gemma-scope.*-transcoders?(-|$)"


def _matches(path: Path) -> bool:
    return any((path / name).exists() for name in _FILES) if path.is_dir() else path.name in _FILES


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    file = (
        path if path.is_file() else next((path / name for name in _FILES if (path / name).exists()), path / _FILES[0])
    )
    first = file.suffix == ".npz"
    weights = TensorFile.npz(file) if first else TensorFile.safetensors(file)
    encoder, decoder = ("W_enc", "W_dec") if first else ("w_enc", "w_dec")
    W_enc = weights.take(encoder, ("d_in", "d_sae"))
    d_in, d_sae = W_enc.shape
    W_dec = weights.take(decoder, (d_sae, "d_out"))
    d_out = W_dec.shape[1]
    parts = [
        W_enc,
        W_dec,
        weights.take("b_enc", (d_sae,)),
        weights.take("b_dec", (d_out,)),
        weights.take("threshold", (d_sae,)).clamp_min(0.0),
    ]
    if "affine_skip_connection" in weights:
        parts.append(weights.take("affine_skip_connection", (d_in, d_out)))
    if "scaling_factor" in weights and not bool((weights.take("scaling_factor", (d_sae,)) == 1.0).all()):
        raise weights.error("scaling_factor", "is not 1 everywhere; what it scales is not documented")
    weights.finish()
    hook_name, hook_name_out, model_name = _origin(file, options, transcodes=len(parts) == 6 or d_out != d_in)
    parts = same_dtype(*parts)
    return LoadedSAE(
        sae=SAE(
            W_enc=parts[0],
            W_dec=parts[1],
            b_enc=parts[2],
            b_dec=parts[3],
            threshold=parts[4],
            W_skip=parts[5] if len(parts) == 6 else None,
            hook_name=hook_name,
            hook_name_out=hook_name_out,
            apply_b_dec_to_input=False,
        ),
        format=FORMAT.name,
        weights=file,
        model_name=model_name,
    )


def _origin(file: Path, options: SourceOptions, *, transcodes: bool) -> tuple[str, str | None, str | None]:
    """The hook points (the second of a transcoder) and the model."""
    config_file = file.parent / CONFIG_FILE
    if file.suffix != ".npz" and config_file.is_file():
        config = JsonFile(config_file)
        if config.get("architecture", str, "jump_relu") != "jump_relu":
            raise config.error("architecture", f"{config.data['architecture']!r} is not supported; only 'jump_relu' is")
        found_in, found_out = _hook(config, "hf_hook_point_in"), _hook(config, "hf_hook_point_out")
        stated_out = config.get("hf_hook_point_out", str)
        transcodes |= stated_out is not None and stated_out != config.get("hf_hook_point_in", str)
        source, model_name = f"hf_hook_point_in in {CONFIG_FILE}", config.get("model_name", str)
    else:
        layer = layer_in(file.absolute(), r"^layer_(\d+)")
        is_transcoder = _named(file, _TRANSCODER)
        site = "hook_mlp_in" if is_transcoder else _site(file)
        found_in = None if layer is None or site is None else f"blocks.{layer}.{site}"
        found_out = None if layer is None else f"blocks.{layer}.hook_mlp_out"
        transcodes |= is_transcoder
        source, model_name = "the folders' names", None
    hook_name = choose_hook(options, found_in, file, source)
    hook_name_out = options.hook_name_out or (found_out if transcodes else None)
    if transcodes and hook_name_out is None:
        raise BankError(
            "it is a transcoder; name the hook point that it predicts", file=str(file), field="hook_name_out"
        )
    return hook_name, hook_name_out, options.model_name or model_name


def _hook(config: JsonFile, field: str) -> str | None:
    """The hook id of a path such as `model.layers.17.output`."""
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)", config.get(field, str, ""))
    site = _PATHS.get(match[2]) if match is not None else None
    return f"blocks.{match[1]}.{site}" if match is not None and site is not None else None


def _named(file: Path, pattern: str) -> bool:
    return any(re.search(pattern, part) for part in file.absolute().parts)


def _site(file: Path) -> str | None:
    return next((site for pattern, site in _SITES if _named(file, pattern)), None)


FORMAT = Format(name="gemma_scope", matches=_matches, read=_read, options=frozenset({"hook_name_out"}))
