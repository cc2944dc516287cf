"""Sparse autoencoders while they are being trained: one architecture a file, one interface for all."""

from training.architectures.base import Architecture, ArchitectureOptions, StepStats
from training.architectures.batch_topk import BatchTopK
from training.architectures.gated import Gated
from training.architectures.jumprelu import JumpReLU
from training.architectures.matryoshka import MatryoshkaBatchTopK
from training.architectures.relu import ReLU
from training.architectures.topk import TopK
from training.architectures.transcoder import SkipTranscoder

ARCHITECTURES: dict[str, type[Architecture]] = {
    kind.name: kind for kind in (ReLU, TopK, BatchTopK, MatryoshkaBatchTopK, JumpReLU, Gated, SkipTranscoder)
}
"""Every architecture by the name that a configuration calls it."""

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ArchitectureOptions",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "MatryoshkaBatchTopK",
    "ReLU",
    "SkipTranscoder",
    "StepStats",
    "TopK",
]
