"""An exported folder in memory: texts in, feature activations out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.bank import Bank
from feature_bank.errors import MissingExtraError
from feature_bank.layout import Rendered, Role, layout, render
from guard.canary import CANARY_TOKENS, canary_error
from guard.engines.onnx_sidecar import MANIFEST, RUNTIME_EXTRA, TOKENIZER, Precision, Sidecar
from guard.engines.onnx_tokens import FileTokenizer
from guard.engines.onnx_windows import Passage, Windows, read_passages
from guard.errors import CanaryError, GuardError
from guard.judge import Floats

BATCH_TOKENS = 1024  # larger batches are no faster on a CPU, and take more memory
WINDOW = 512
"""Tokens of a window of a text that lies there whole; attention costs their square."""
STREAM = Windows(context=128, stride=64)
"""Of an answer that grows the context is read again with every push, so it is shorter."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What was exported. Engines with other heads or another policy share it."""

    folder: Path
    digest: str
    """sha256 of the manifest."""
    sidecar: Sidecar
    precision: Precision
    bank: Bank
    tokenizer: FileTokenizer
    session: Any
    threads: int
    windows: Windows
    streaming: Windows

    @classmethod
    def load(cls, folder: Path, precision: Precision | None, threads: int) -> ExportedModel:
        """Verify and load a folder. threads: 0 for as many as there are cores.

        Raises GuardError if a file is missing or altered, or the folder has no graph of the precision.
        """
        sidecar = Sidecar.load(folder)
        chosen = sidecar.choose(precision)
        sidecar.verify(folder, chosen)
        room = sidecar.context_length - max(len(ids) for ids in sidecar.head_ids.values())
        return cls(
            folder=folder,
            digest=folder_digest(folder),
            sidecar=sidecar,
            precision=chosen,
            bank=sidecar.read_bank(folder),
            tokenizer=FileTokenizer(folder / TOKENIZER, sidecar.special_ids),
            session=_open(folder / sidecar.graphs[chosen].file, threads),
            threads=threads,
            windows=Windows.of_length(min(WINDOW, room)),
            streaming=STREAM if STREAM.length <= room else Windows.of_length(room),
        )

    def read(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> Floats:
        """(batch, length) ids and mask -> (batch, length, F) feature activations."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        try:
            acts: Floats = self.session.run(["feature_acts"], feeds)[0]
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise GuardError(f"the graph failed on {input_ids.shape} ids: {error}") from error
        return acts

    def read_stream(self, passages: Sequence[Passage]) -> list[Floats]:
        """Activations of the new tokens of answers that grow."""
        return read_passages(self.read, passages, self.streaming, BATCH_TOKENS)

    def rendered(self, text: str, role: Role, max_tokens: int) -> Rendered:
        """The ids that are read when a text is judged in a role."""
        head = self.sidecar.head_ids[role]
        return render(self.tokenizer, text, role, max_tokens=max_tokens, head=head)

    def activations(self, rendered: Sequence[Rendered]) -> list[Floats]:
        """(n, F) of every rendered text, those of what stands before it included; none of a text without tokens."""
        passages = [Passage(r.ids[: r.start], r.ids[r.start :]) for r in rendered]
        empty = np.zeros((0, len(self.bank.features)), dtype=np.float32)
        found = read_passages(self.read, passages, self.windows, BATCH_TOKENS)
        return [acts if len(acts) else empty for acts in found]

    def canary_error(self, bank: Bank) -> float:
        """How far the canary's activations are off those recorded in the bank, relative to these."""
        rendered = self.rendered(bank.manifest.canary.text, "passage", CANARY_TOKENS)
        (acts,) = self.activations([rendered])
        return canary_error(bank, acts[layout(rendered.ids, self.sidecar.special_ids).observed].mean(0))

    def check_canary(self, bank: Bank) -> None:
        """Raise CanaryError if the canary's activations are not those recorded in the bank."""
        error, tolerance = self.canary_error(bank), self.sidecar.graphs[self.precision].canary_tolerance
        if not error <= tolerance:  # which NaN is not
            raise CanaryError(
                f"the canary text gave activations {error:.1%} off the recorded ones (at most {tolerance:.0%} is "
                f"accepted) with the {self.precision} graph in {self.folder}; export the bank again on this machine"
            )


def _open(path: Path, threads: int) -> Any:
    """The session of a graph. Raises MissingExtraError without ONNX Runtime, GuardError if it refuses the file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(f"the ONNX engine needs onnxruntime: {RUNTIME_EXTRA}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # plans that are kept for every shape of a batch would add up
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise GuardError(f"{path} cannot be run: {error}; export the bank again") from error


def folder_digest(folder: Path) -> str:
    """sha256 of a folder's manifest, which holds the hashes of the rest. Raises GuardError if it is gone."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise GuardError(f"{folder / MANIFEST} cannot be read ({error.strerror})") from error
