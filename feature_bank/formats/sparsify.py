"""EleutherAI sparsify: a folder per hook point with `cfg.json` and `sae.safetensors`.

encode: the k largest of ReLU((x - b_dec) W^T + b); a transcoder does not subtract. The decoder is stored with a row a
feature, unlike the encoder's `nn.Linear` layout of (out, in), which is a row a feature too.
"""

from __future__ import annotations

from pathlib import Path

import torch

from feature_bank.errors import BankError
from feature_bank.formats.files import JsonFile, TensorFile, same_dtype
from feature_bank.formats.folding import widen
from feature_bank.formats.hook_names import choose_hook, hook_input, hook_output
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions
from feature_bank.sae import SAE

__all__ = ["FORMAT"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
_HINT = f"a sparsify folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"


def _matches(path: Path) -> bool:
    return (path / WEIGHTS_FILE).exists() if path.is_dir() else path.name == WEIGHTS_FILE


def _read(path: Path, options: SourceOptions) -> LoadedSAE:
    folder = path.parent if path.name == WEIGHTS_FILE else path
    cfg = JsonFile(folder / CONFIG_FILE, hint=_HINT)
    weights = TensorFile.safetensors(folder / WEIGHTS_FILE, hint=_HINT)
    if cfg.get("activation", str, "topk") != "topk":
        raise cfg.error("activation", f"{cfg.data['activation']!r} is not supported; only 'topk' is")
    if cfg.get("signed", bool, False):
        raise cfg.error("signed", "activations that may be negative are not supported")
    W_enc = weights.take("encoder.weight", ("d_sae", "d_in"))
    d_sae, d_in = W_enc.shape
    cfg.expect("d_in", d_in)
    stated = cfg.get("num_latents", int, 0)
    if stated not in (0, d_sae):
        raise cfg.error("num_latents", f"{stated} is not that of the weights, {d_sae}")
    if stated == 0 and cfg.get("expansion_factor", int, 0) not in (0, d_sae / d_in):
        raise cfg.error(
            "expansion_factor", f"{cfg.data['expansion_factor']} is not that of the weights, {d_sae / d_in:g}"
        )
    k = cfg.need("k", int)
    if not 1 <= k <= d_sae:
        raise cfg.error("k", f"{k} is not between 1 and the {d_sae} features")
    b_enc = weights.take("encoder.bias", (d_sae,))
    W_dec = weights.take("W_dec", (d_sae, d_in))
    b_dec = weights.take("b_dec", (d_in,))
    W_skip = weights.take("W_skip", (d_in, d_in)) if "W_skip" in weights else None
    if (W_skip is not None) != cfg.get("skip_connection", bool, False):
        raise cfg.error("skip_connection", "does not agree with the weights about a W_skip")
    weights.finish()

    transcodes = cfg.get("transcode", bool, False)
    hook_name, hook_name_out = _hooks(folder, options, transcodes)
    notes = []
    if W_skip is not None and not transcodes:
        # With a skip the input is read twice; as a transcoder of the hook point onto itself it stays exact.
        b_enc = widen(b_enc) - widen(W_enc) @ widen(b_dec)
        hook_name_out = hook_name
        notes.append("An SAE with a skip connection was read as a transcoder from its hook point to itself.")
    encoder, decoder, bias, b_dec = same_dtype(W_enc.T.contiguous(), W_dec, b_enc, b_dec)
    return LoadedSAE(
        sae=SAE(
            W_enc=encoder,
            W_dec=decoder,
            b_enc=bias,
            b_dec=b_dec,
            threshold=torch.zeros_like(bias),
            hook_name=hook_name,
            hook_name_out=hook_name_out,
            apply_b_dec_to_input=hook_name_out is None,
            k=k,
            W_skip=None if W_skip is None else W_skip.T.contiguous().to(encoder.dtype),
        ),
        format=FORMAT.name,
        weights=weights.path,
        model_name=options.model_name or _model_name(folder),
        notes=tuple(notes),
    )


def _run_folder(folder: Path) -> tuple[str, Path]:
    """The hook point's module path and the folder of the whole run: `run/layers.5` or `run/layers.5/seed0`."""
    folder = folder.absolute()
    if folder.name.startswith("seed"):
        folder = folder.parent
    return folder.name, folder.parent


def _hooks(folder: Path, options: SourceOptions, transcodes: bool) -> tuple[str, str | None]:
    module, _ = _run_folder(folder)
    source = f"the folder's name, {module!r}"
    if not transcodes:
        if options.hook_name_out is not None:
            raise BankError("this is no transcoder", file=str(folder / CONFIG_FILE), field="hook_name_out")
        return choose_hook(options, hook_output(module), folder, source), None
    name = choose_hook(options, hook_input(module), folder, source)
    out = options.hook_name_out or hook_output(module)
    if out is None:
        raise BankError(f"no hook point can be told from {source}", file=str(folder), field="hook_name_out")
    return name, out


def _model_name(folder: Path) -> str | None:
    config = _run_folder(folder)[1] / "config.json"
    name = JsonFile(config).get("model", str) if config.is_file() else None
    return name if isinstance(name, str) else None


FORMAT = Format(name="sparsify", matches=_matches, read=_read, options=frozenset({"hook_name_out"}))
