"""The engine that judges texts with an exported graph: ONNX Runtime, `tokenizers` and NumPy, no torch.

It generates nothing. A folder for it is written by `sailguard export-onnx` (see `guard.engines.onnx_sidecar`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from feature_bank.bank import Bank
from feature_bank.layout import Role
from guard.engines.onnx_model import ExportedModel, folder_digest
from guard.engines.onnx_sidecar import Precision, check_fits
from guard.engines.onnx_stream import Released, ResponseJudge, push_all
from guard.events import TextScore, Trace
from guard.judge import TOP_FEATURES
from guard.metrics import Metrics
from guard.policy import Policy
from guard.reports import ShownFeatures, publish
from guard.stream_judge import StreamJudge
from guard.text_judging import score_text, trace_text

__all__ = ["OnnxEngine", "Released", "ResponseJudge"]

MAX_TOKENS = 32768
STEP_TOKENS = 8


class OnnxEngine:
    """Judges texts with one exported model under one bank and one policy. One thread at a time; answers that grow may
    be judged on another one.

    A text longer than a window is read in windows that overlap: each token is taken from one of them, where it has at
    least a quarter of a window before it, or all there is. Moving averages and agreement then run once over the
    activations of the whole text, as if it had been read at once.
    """

    generates = False

    def __init__(self, model: ExportedModel, bank: Bank, policy: Policy, metrics: Metrics, max_tokens: int) -> None:
        if bank is not model.bank:
            check_fits(bank, model.bank)
        model.check_canary(bank)
        self._model = model
        self._judge = StreamJudge(bank, policy)
        self._special = frozenset(model.sidecar.special_ids)
        self._max_tokens = max_tokens
        self._shown = ShownFeatures(metrics, bank)
        self.metrics = metrics

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        bank: Path | None = None,
        policy: Path | None = None,
        metrics: Metrics | None = None,
        threads: int = 0,
        precision: Precision | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> OnnxEngine:
        """Verify and load an exported folder, and run its canary.

        bank: one with the same features, in place of the one in the folder. policy: a file; the default one if left
        out. threads: 0 for as many as there are cores. precision: int8 if it is there. max_tokens: of a text, what
        stands before it included; the rest is left out, and `TextScore.truncated` says so.

        Raises GuardError if a file is missing or altered or the bank does not fit, BankError, PolicyError and
        CanaryError.
        """
        model = ExportedModel.load(Path(folder), precision, threads)
        engine = cls(
            model,
            model.bank if bank is None else Bank.load(bank),
            Policy.default() if policy is None else Policy.load(policy),
            metrics or Metrics(),
            max_tokens,
        )
        publish(engine.metrics, engine.bank, engine.policy)
        return engine

    def reloaded(self, bank: Path | None, policy: Path | None) -> OnnxEngine:
        """The same model under another bank, another policy or both; None keeps what there is. This engine goes on.

        With a bank the folder is read again if it was exported anew meanwhile. Raises what `start` raises.
        """
        model = self._model
        if bank is not None and folder_digest(model.folder) != model.digest:
            model = ExportedModel.load(model.folder, model.precision, model.threads)
        engine = OnnxEngine(
            model,
            self.bank if bank is None else Bank.load(bank),
            self.policy if policy is None else Policy.load(policy),
            self.metrics,
            self._max_tokens,
        )
        publish(engine.metrics, engine.bank, engine.policy)
        return engine

    def close(self) -> None:
        """Nothing: the model goes with the last engine that uses it."""

    @property
    def model_id(self) -> str:
        """Id of the model that was exported."""
        return self._model.sidecar.model.id

    @property
    def bank(self) -> Bank:
        """The feature bank."""
        return self._judge.bank

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self._judge.policy

    @property
    def bank_version(self) -> str:
        """Version of the feature bank, as it stands in verdicts."""
        return self.bank.version

    @property
    def policy_version(self) -> str:
        """Version of the policy, as it stands in verdicts."""
        return self.policy.version

    @property
    def precision(self) -> Precision:
        """Which graph is used."""
        return self._model.precision

    @property
    def context_length(self) -> int:
        """Most tokens that the model takes at once; longer texts are read in windows."""
        return self._model.sidecar.context_length

    def score(
        self, texts: Sequence[str], roles: Sequence[Role], *, keep: Sequence[bool] | None = None
    ) -> list[TextScore]:
        """Judge texts, each in its role; one result each, in order.

        keep: of which texts the results hold what was seen; with it, those of texts on which a rule fires do too.
        """
        rendered = [self._model.rendered(t, r, self._max_tokens) for t, r in zip(texts, roles, strict=True)]
        acts = self._model.activations(rendered)
        for part in acts:
            self._shown.observe(part)
        wanted = [None] * len(texts) if keep is None else keep
        return [
            score_text(self._judge, each, role, part, self._special, keep=kept)
            for each, role, part, kept in zip(rendered, roles, acts, wanted, strict=True)
        ]

    def trace(self, text: str, role: Role, *, top: int | None = TOP_FEATURES) -> Trace:
        """Judge one text and keep what every token showed: its `top` strongest features, or all that are active."""
        rendered = self._model.rendered(text, role, self._max_tokens)
        (acts,) = self._model.activations([rendered])
        return trace_text(self._judge, rendered, role, acts, self._special, self._model.tokenizer.decode, top)

    def open_response(
        self, *, request_id: str = "", step_tokens: int = STEP_TOKENS, keep: bool = False
    ) -> ResponseJudge:
        """A judge for one answer that comes as text, piece by piece.

        step_tokens: how many new tokens wait for each other; reading costs a pass over their left context.
        keep: whether what is seen of its tokens is kept, for `ResponseJudge.seen`.
        """
        return ResponseJudge(
            self._judge,
            self._model.tokenizer,
            self._model.sidecar.head_ids["response"],
            self._model.read_stream,
            request_id=request_id,
            step_tokens=step_tokens,
            keep=keep,
        )

    def push_all(self, pushes: Sequence[tuple[ResponseJudge, str, bool]]) -> list[Released]:
        """`ResponseJudge.push` of (judge, text, last) for several answers at once, each at most once."""
        return push_all(self._model.read_stream, pushes)
