"""What a SAELens `cfg.json` says of the weights beside it, of any version, and which of it cannot be kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from feature_bank.errors import BankError
from feature_bank.formats.files import JsonFile
from feature_bank.formats.source import SourceOptions
from feature_bank.sae import SAE

__all__ = ["SAELensConfig", "architecture_of"]

_TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "topk_transcoder",
    "topk_skip_transcoder",
)
_ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk", *_TRANSCODERS)
_FOLDED = ("none", "expected_average_only_in")
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def architecture_of(sae: SAE) -> str:
    """The SAELens architecture that an SAE is written as. Raises BankError for a TopK SAE with thresholds."""
    thresholded = bool((sae.threshold > 0).any())
    if sae.k is not None and thresholded:
        raise BankError("SAELens' TopK has no thresholds; set them to zero, or k to None", field="threshold")
    form = "topk" if sae.k is not None else "jumprelu" if thresholded else ""
    if not sae.is_transcoder:
        return form or "standard"
    return "_".join(part for part in (form, "skip" if sae.W_skip is not None else "", "transcoder") if part)


@dataclass(kw_only=True)
class SAELensConfig:
    """The fields that encode and decode depend on, checked."""

    file: JsonFile
    architecture: str
    hook_name: str
    hook_name_out: str | None
    model_name: str | None
    apply_b_dec_to_input: bool
    k: int | None
    rescales: bool
    """Pre-activations are multiplied by the decoder rows' norms, and activations divided by them to decode."""
    norm_factor: float | None
    scales_features: bool
    encoder_only: bool
    notes: list[str] = field(default_factory=list)

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another hook point."""
        return self.architecture in _TRANSCODERS

    @property
    def has_skip(self) -> bool:
        """Whether there is a `W_skip`."""
        return "skip" in self.architecture

    @property
    def per_token_top_k(self) -> bool:
        """Whether `k` cuts each token (in a BatchTopK checkpoint it was an average over the batch)."""
        return self.architecture.startswith("topk")

    def check_sizes(self, d_in: int, d_sae: int, d_out: int) -> None:
        """Raise BankError if the configuration states other sizes than the weights have."""
        self.file.expect("d_in", d_in)
        self.file.expect("d_sae", d_sae)
        if self.is_transcoder:
            self.file.expect("d_out", d_out)
        if self.per_token_top_k and self.k is not None and self.k > d_sae:
            raise self.file.error("k", f"{self.k} is more than the {d_sae} features")

    @classmethod
    def read(cls, file: JsonFile, options: SourceOptions) -> SAELensConfig:
        """Check a configuration. Raises BankError naming the field that is missing, malformed or unsupported."""
        stored = file.get("metadata.sailguard.notes", list, []) if isinstance(file.data.get("metadata"), dict) else []
        notes = [note for note in stored if isinstance(note, str)]
        old = _is_old(file)
        if old:
            _modernise(file)
            notes.append("A configuration from before SAELens 6, read with the defaults of its time.")
        architecture = file.need("architecture", str, f"known are {', '.join(_ARCHITECTURES)}")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise file.error("architecture", f"{architecture!r} is not supported; known are {known}")
        _check_activation(file, architecture)
        if file.get("reshape_activations", str, "none") != "none":
            raise file.error(
                "reshape_activations",
                f"{file.data['reshape_activations']!r} is not supported; only activations that need no reshaping are",
            )
        hook_name = options.hook_name or file.get("metadata.hook_name", str)
        if hook_name is None:
            raise file.error("hook_name" if old else "metadata.hook_name", "missing; name it with hook_name")
        hook_name_out = None
        if architecture in _TRANSCODERS:
            hook_name_out = options.hook_name_out or file.need(
                "metadata.hook_name_out", str, "a transcoder predicts a hook point; name it with hook_name_out"
            )
        elif options.hook_name_out is not None:
            raise file.error("architecture", f"{architecture!r} is no transcoder, so it has no hook_name_out")
        subtract = file.get("apply_b_dec_to_input", bool, architecture not in _TRANSCODERS)
        if subtract and architecture in _TRANSCODERS:
            raise file.error("apply_b_dec_to_input", "true is not possible for a transcoder; b_dec is its output's")
        top_k = "topk" in architecture
        factor = _norm_factor(file, options, notes)
        return cls(
            file=file,
            architecture=architecture,
            hook_name=hook_name,
            hook_name_out=hook_name_out,
            model_name=options.model_name or file.get("metadata.model_name", str),
            apply_b_dec_to_input=subtract,
            k=_whole(file, file.need("k", (int, float))) if top_k and architecture.startswith("topk") else None,
            rescales=top_k and file.get("rescale_acts_by_decoder_norm", bool, False),
            norm_factor=factor,
            scales_features=file.get("finetuning_scaling_factor", bool, False),
            encoder_only=file.get("metadata.sailguard.encoder_only", bool, False),
            notes=notes,
        )


def _whole(file: JsonFile, k: float) -> int:
    if k != int(k) or k < 1:
        raise file.error("k", f"{k!r} is no positive whole number")
    return int(k)


def _is_old(file: JsonFile) -> bool:
    """Whether the configuration is from before SAELens 6, which moved the hook and the version into `metadata`."""
    if not isinstance(file.data.get("metadata", {}), dict):
        return False
    version = file.get("sae_lens_version", str) or file.get("metadata.sae_lens_version", str)
    if version is None:
        return "metadata" not in file.data
    match = re.match(r"(\d+)\.", version)
    if match is None:
        raise file.error("metadata.sae_lens_version", f"{version!r} is no version")
    return int(match[1]) < 6


def _modernise(file: JsonFile) -> None:
    """Bring an old configuration into the current form, in memory, with the defaults that SAELens gave it."""
    old: dict[str, Any] = {_OLD_NAMES.get(key, key): value for key, value in file.data.items()}
    metadata = old.pop("metadata", {})
    new = {"architecture": "standard", **old}
    new["metadata"] = {key: old[key] for key in ("hook_name", "hook_name_out", "model_name") if key in old} | metadata
    if isinstance(new.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if new["normalize_activations"] else "none"
    if new.get("activation_fn") == "topk":
        kwargs = new.get("activation_fn_kwargs")
        new["architecture"] = "topk"
        new["k"] = kwargs.get("k") if isinstance(kwargs, dict) else None
    if new.get("reshape_activations") is None and "hook_z" in str(new["metadata"].get("hook_name")):
        new["reshape_activations"] = "hook_z"
    file.data = new


def _check_activation(file: JsonFile, architecture: str) -> None:
    """Old configurations name the activation function; only those of today's architectures are kept."""
    name = file.get("activation_fn", str)
    fits = name in (None, "relu") or (name == "topk" and architecture == "topk")
    if not fits:
        raise file.error("activation_fn", f"{name!r} is not supported; relu and topk are")


def _norm_factor(file: JsonFile, options: SourceOptions, notes: list[str]) -> float | None:
    """The factor to fold, if the weights expect scaled activations."""
    kind = file.get("normalize_activations", str, "none")
    if kind not in _FOLDED:
        raise file.error(
            "normalize_activations",
            f"{kind!r} is not supported; it depends on each token, so it cannot be folded into the weights"
            if kind in ("layer_norm", "constant_norm_rescale")
            else f"{kind!r} is not supported; fold the normalisation into the weights first",
        )
    if kind == "none":
        if options.norm_factor is not None:
            raise file.error("normalize_activations", "'none', so there is no norm_factor to fold")
        return None
    if options.norm_factor is None:
        raise file.error(
            "normalize_activations",
            f"{kind!r}: the weights expect activations times a factor that the folder does not hold; "
            "give it as norm_factor",
        )
    if not 0 < options.norm_factor < float("inf"):
        raise BankError(f"{options.norm_factor} is no positive number", field="norm_factor")
    notes.append(f"Activations were scaled by {options.norm_factor:g} in training; that was folded in.")
    return options.norm_factor
