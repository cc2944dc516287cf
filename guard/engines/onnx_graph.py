"""A model up to the last hooked layer, the bank's rows and its heads as one graph in ONNX's format."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from feature_bank.bank import Bank
from feature_bank.errors import MissingExtraError
from guard.capture import Capture
from guard.engines.onnx_sidecar import EXTRA
from guard.errors import GuardError
from guard.heads import DomainHeads
from guard.hook_points import blocks_before, execution_order, parse_hook_name

OPSET = 20
INPUTS = ("input_ids", "attention_mask")
ACTS = "feature_acts"
LARGEST = 1_500_000_000  # bytes; ONNX keeps at most 2 GB in one file, and the rest in another beside it
ENCODER = "encoder"  # begins the names of the weights that stay as they are when the model's become int8


class GuardGraph(nn.Module):
    """What is exported. The model must be shortened already (`shortened`)."""

    def __init__(self, model: nn.Module, bank: Bank) -> None:
        super().__init__()
        self.model = model
        self.hook_names = bank.hook_names
        self.ceiling = bank.pooling.ceiling
        start = 0
        thresholds = []
        for number, name in enumerate(bank.hook_names):
            rows = bank.rows[name]
            scale = torch.tensor([f.scale for f in bank.features[start : start + len(rows.b_enc)]])
            start += len(scale)
            self.register_buffer(f"{ENCODER}_{number}_weight", torch.from_numpy(rows.W_enc) / scale)
            self.register_buffer(f"{ENCODER}_{number}_bias", torch.from_numpy(rows.b_enc) / scale)
            thresholds.append(torch.from_numpy(rows.threshold) / scale)
        self.register_buffer("threshold", torch.cat(thresholds))
        heads, streaming = DomainHeads(bank), DomainHeads(bank, streaming=True)
        self.streams_apart = bool((heads.weight != streaming.weight).any())
        self.register_buffer(f"{ENCODER}_heads", torch.from_numpy(heads.weight))
        self.register_buffer(f"{ENCODER}_streaming_heads", torch.from_numpy(streaming.weight))

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` returns."""
        return [ACTS, "evidence", *(["streaming_evidence"] if self.streams_apart else [])]

    def forward(self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]) -> tuple[Tensor, ...]:
        """Right-padded ids and mask -> activations (B, T, F) and evidence (B, T, D), zero where the padding is."""
        found: dict[str, Float[Tensor, "B T d_in"]] = {}
        with Capture(self.model, self.hook_names, found.__setitem__):
            base: Any = self.model.base_model
            base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        parts = [
            found[name] @ self.get_buffer(f"{ENCODER}_{i}_weight") + self.get_buffer(f"{ENCODER}_{i}_bias")
            for i, name in enumerate(self.hook_names)
        ]
        pre = torch.cat(parts, dim=-1)
        acts = torch.where(pre <= self.get_buffer("threshold"), 0.0, pre) * attention_mask[..., None]
        clipped = acts.clamp_max(self.ceiling)
        evidence = clipped @ self.get_buffer(f"{ENCODER}_heads")
        if not self.streams_apart:
            return acts, evidence
        return acts, evidence, clipped @ self.get_buffer(f"{ENCODER}_streaming_heads")


@contextmanager
def shortened(model: Any, bank: Bank) -> Iterator[Any]:
    """The model without what comes after the last hooked layer, for as long as this lasts.

    Attention is written out: a graph has no better form of it, and the fused one guards rows that there are none of.
    """
    last = parse_hook_name(max(bank.hook_names, key=execution_order)).layer
    base = model.base_model
    layers, norm, attention = base.layers, base.norm, model.config._attn_implementation
    base.layers = nn.ModuleList(blocks_before(model, f"blocks.{last}.hook_resid_post"))
    base.norm = nn.Identity()
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        base.layers, base.norm = layers, norm
        model.set_attn_implementation(attention)


def write_graph(model: Any, bank: Bank, path: Path) -> list[str]:
    """Write the float32 graph of a model on the CPU; returns the names of its outputs.

    Raises MissingExtraError without the exporter, GuardError if the model cannot be exported.
    """
    try:
        import onnxscript  # noqa: F401  # the exporter asks for it, with an error that names no extra of ours
    except ImportError as error:
        raise MissingExtraError(f"the export needs onnx and onnxscript: {EXTRA}") from error
    with shortened(model, bank), torch.no_grad(), _quiet():
        graph = GuardGraph(model, bank).eval()
        ids = torch.zeros(2, 24, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[1, 16:] = 0
        axes = {0: torch.export.Dim("batch", min=1, max=65536), 1: torch.export.Dim("length", min=1)}
        try:
            program: Any = torch.onnx.export(
                graph,
                (ids, mask),
                dynamo=True,
                input_names=list(INPUTS),
                output_names=graph.outputs,
                dynamic_shapes=(axes, axes),
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter's errors have no common base
            reason = str(error).strip().splitlines()
            raise GuardError(
                f"the model cannot be exported: {reason[-1] if reason else type(error).__name__}"
            ) from error
        size = sum(p.numel() * p.element_size() for p in graph.parameters())
        program.save(str(path), external_data=size > LARGEST)
        return graph.outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's advice; what fails is raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
