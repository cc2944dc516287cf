"""What a training costs elsewhere: operations and bytes from the shapes, hours from measured rates and published peaks.

A rate is either measured (tokens/s in a result of this benchmark, turned into operations/s with the same counting) or a
device's published peak. Hours from a peak are a floor: nothing is faster, and nothing reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FLOAT32, BFLOAT16 = 4, 2  # bytes
ADAM_OPERATIONS = 12  # a parameter and step
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder whose layers are gated MLPs and grouped-query attention. Embedding and head are not counted."""

    layers: int
    d_model: int
    d_mlp: int
    d_kv: int
    """Width of the keys, and of the values: heads times their size."""

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's products."""
        return 2 * self.d_model**2 + 2 * self.d_model * self.d_kv + 3 * self.d_model * self.d_mlp

    def operations(self, layers: int, context: int) -> float:
        """Operations a token of the first `layers` layers: two a weight, and causal attention over half the context."""
        return layers * (2.0 * self.layer_parameters + 4.0 * self.d_model * context / 2)


QWEN_3B = ModelShape(layers=36, d_model=2048, d_mlp=11_008, d_kv=256)
"""Qwen2.5-3B."""
SMOLLM2 = ModelShape(layers=30, d_model=576, d_mlp=1536, d_kv=192)
"""SmolLM2-135M, the embedded model."""


@dataclass(frozen=True, kw_only=True)
class SaeShape:
    """A TopK or BatchTopK SAE and its batch."""

    d_in: int
    d_sae: int
    k: int
    batch_tokens: int

    @property
    def operations(self) -> float:
        """Operations a token of our step.

        Two dense products (the encoder; the output gradient times the decoder, of which the active entries are used),
        three sparse ones (decode, the gradients of decoder and encoder), and Adam's share of a batch.
        """
        dense = 2.0 * self.d_in * self.d_sae
        sparse = 2.0 * self.d_in * self.k
        return 2 * dense + 3 * sparse + ADAM_OPERATIONS * self._parameters / self.batch_tokens

    @property
    def floor_operations(self) -> float:
        """Operations a token that no exact top-k training is without: the dense encoder, four sparse products, Adam."""
        dense = 2.0 * self.d_in * self.d_sae
        sparse = 2.0 * self.d_in * self.k
        return dense + 4 * sparse + ADAM_OPERATIONS * self._parameters / self.batch_tokens

    @property
    def floor_bytes(self) -> float:
        """Bytes a token that have to move, with weights, gradients and moments in float32.

        A step reads the weights twice (forward, backward), writes and reads the gradients, reads and writes weights and
        both moments once (Adam); pre-activations are written and read once; a token's activation is read once.
        """
        weights = self._parameters * FLOAT32 * (2 + 2 + 6)
        return weights / self.batch_tokens + FLOAT32 * (2 * self.d_sae + self.d_in)

    @property
    def _parameters(self) -> int:
        return 2 * self.d_in * self.d_sae


@dataclass(frozen=True, kw_only=True)
class Device:
    """Published peaks."""

    name: str
    operations: float
    """A second, in dense bfloat16 products."""
    bandwidth: float
    """Bytes a second."""


DEVICES = (
    Device(name="A100 80 GB", operations=312e12, bandwidth=2.0e12),
    Device(name="H100 SXM", operations=989e12, bandwidth=3.35e12),
)


def floor_seconds(operations: float, moved: float, device: Device) -> float:
    """The larger of the arithmetic's and the memory's time: the two can overlap, and neither can be less."""
    return max(operations / device.operations, moved / device.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Several SAEs on one model from one harvest."""

    model: ModelShape
    hook_layers: tuple[int, ...]
    """Blocks whose output is harvested."""
    sae: SaeShape
    tokens: float
    context: int
    model_batch_tokens: int
    """Tokens of a forward pass of the model."""

    @property
    def harvest_operations(self) -> float:
        """Of one forward pass over all tokens, cut off after the last hook point."""
        return self.tokens * self.model.operations(max(self.hook_layers) + 1, self.context)

    @property
    def harvest_bytes_moved(self) -> float:
        """Weights read once a pass, activations written once."""
        layers = max(self.hook_layers) + 1
        weights = layers * self.model.layer_parameters * BFLOAT16 / self.model_batch_tokens
        return self.tokens * (weights + len(self.hook_layers) * self.model.d_model * BFLOAT16)

    @property
    def cache_bytes(self) -> float:
        """Activations (bfloat16) and their lengths (float32) at every hook point, document and token (int32)."""
        per_token = len(self.hook_layers) * (self.model.d_model * BFLOAT16 + FLOAT32) + 2 * 4
        return self.tokens * per_token

    @property
    def state_bytes(self) -> float:
        """Weights, gradients and moments of all SAEs in float32."""
        return len(self.hook_layers) * 2 * self.sae.d_in * self.sae.d_sae * FLOAT32 * 4


QWEN_PLAN = Job(
    model=QWEN_3B,
    hook_layers=(0, 8, 17, 26, 35),
    sae=SaeShape(d_in=2048, d_sae=20_480, k=64, batch_tokens=8192),
    tokens=1e9,
    context=1024,
    model_batch_tokens=16_384,
)
UTILISATION = 0.35  # of a peak; an assumption, not a measurement
DISK_BYTES_PER_SECOND = 2e9  # likewise


def plan(
    job: Job,
    *,
    harvest_rate: float,
    train_rate: float,
    measured_model: ModelShape,
    measured_layers: int,
    measured_context: int,
    measured_sae: SaeShape,
    gpu_train_rate: float | None = None,
) -> dict[str, Any]:
    """Hours, bytes and GPU-hours of a job.

    harvest_rate, train_rate: tokens/s measured here, of `measured_layers` layers of `measured_model` and of
    `measured_sae`. They are carried over as operations/s. gpu_train_rate: tokens/s measured on an accelerator with the
    job's own SAE (batch aside), or None.
    """
    saes = len(job.hook_layers)
    harvest_speed = harvest_rate * measured_model.operations(measured_layers, measured_context)
    train_speed = train_rate * measured_sae.operations
    here = {
        "harvest": job.harvest_operations / harvest_speed / HOUR,
        "train": saes * job.tokens * job.sae.operations / train_speed / HOUR,
    }
    devices = {}
    for device in DEVICES:
        floor = {
            "harvest": floor_seconds(job.harvest_operations, job.harvest_bytes_moved, device) / HOUR,
            "train": saes * job.tokens * floor_seconds(job.sae.floor_operations, job.sae.floor_bytes, device) / HOUR,
        }
        devices[device.name] = {
            **asdict(device),
            "floor_hours": floor | {"total": sum(floor.values())},
            "assumed_hours": {stage: hours / UTILISATION for stage, hours in floor.items()}
            | {"total": sum(floor.values()) / UTILISATION},
        }
    return {
        "job": asdict(job),
        "bytes": {
            "cache": job.cache_bytes,
            "model_weights": job.model.layers * job.model.layer_parameters * BFLOAT16,
            "sae_state": job.state_bytes,
        },
        "operations": {
            "harvest": job.harvest_operations,
            "train": saes * job.tokens * job.sae.operations,
        },
        "measured": {
            "harvest_tokens_per_s": harvest_rate,
            "train_tokens_per_s": train_rate,
            "harvest_operations_per_s": harvest_speed,
            "train_operations_per_s": train_speed,
        },
        "cpu_hours": here | {"total": sum(here.values())},
        "devices": devices,
        "utilisation": UTILISATION,
        "disk_hours_each_way": job.cache_bytes / DISK_BYTES_PER_SECOND / HOUR,
        "gpu_train_hours_measured": None if gpu_train_rate is None else saes * job.tokens / gpu_train_rate / HOUR,
    }


def device_floor(sae: SaeShape, *, operations: float, bandwidth: float) -> Mapping[str, float]:
    """Tokens/s that a device with these rates cannot exceed: by arithmetic, by memory, and both."""
    by_arithmetic, by_memory = operations / sae.floor_operations, bandwidth / sae.floor_bytes
    return {"arithmetic": by_arithmetic, "memory": by_memory, "floor": min(by_arithmetic, by_memory)}
