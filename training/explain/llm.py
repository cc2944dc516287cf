"""The explainer that is a language model: it reads a feature's excerpts and says in a sentence what they share."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence

from feature_bank.schema import Explainer
from training.explain.answers import clean_text, read_object
from training.explain.interface import Explanation, FeatureEvidence
from training.explain.prompts import MAX_EXPLANATION_CHARS, PROMPT_BUDGET, explanation_prompt
from training.explain.replies import Answerer, ChatReply, ChatRequest

MAX_ANSWER = 200
"""Tokens that an answer may have."""


class LlmExplainer:
    """Explains features through a chat endpoint.

    An answer that cannot be read is asked for once more, in other words (the same ones would bring the same answer at
    temperature 0). A feature without a readable answer, or without an excerpt on which it fires, is missing from the
    result: no text is ever made up for it. budget: tokens of excerpts that are shown of one feature.
    """

    def __init__(
        self,
        endpoint: Answerer,
        *,
        budget: int = PROMPT_BUDGET,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.budget = budget
        self._report = report

    def requests(self, evidence: Sequence[FeatureEvidence], *, again: bool = False) -> dict[str, ChatRequest]:
        """The question about each feature that fires anywhere."""
        return {
            feature.id: ChatRequest(
                messages=explanation_prompt(feature, budget=self.budget, again=again), max_answer=MAX_ANSWER
            )
            for feature in evidence
            if feature.positives
        }

    def explain(self, evidence: Sequence[FeatureEvidence]) -> dict[str, Explanation]:
        """Explanations by feature id, in the order of the evidence. Raises what `ChatEndpoint.ask_all` raises."""
        return self.explain_known(evidence)[0]

    def explain_known(self, evidence: Sequence[FeatureEvidence]) -> tuple[dict[str, Explanation], set[str]]:
        """The explanations, and the features that are without one because nobody was asked: the endpoint is offline."""
        requests = self.requests(evidence)
        found, unread, unasked = self._ask(requests)
        again = self.requests([feature for feature in evidence if feature.id in unread], again=True)
        more, _, still_unasked = self._ask(again)
        found |= more
        return {id_: found[id_] for id_ in requests if id_ in found}, unasked | still_unasked

    def _ask(self, requests: dict[str, ChatRequest]) -> tuple[dict[str, Explanation], set[str], set[str]]:
        """The explanations, the features whose answers could not be read, and those that were not asked about."""
        replies = self.endpoint.ask_all(list(requests.values()), report=self._report)
        found: dict[str, Explanation] = {}
        unread: set[str] = set()
        unasked: set[str] = set()
        for (id_, request), reply in zip(requests.items(), replies, strict=True):
            if (text := read_explanation(reply)) is not None:
                found[id_] = Explanation(text=text, explainer=self._record(request))
            elif reply.status == "answered":
                unread.add(id_)
            elif reply.status == "not_asked":
                unasked.add(id_)
        return found, unread, unasked

    def _record(self, request: ChatRequest) -> Explainer:
        prompt = json.dumps(request.payload(), sort_keys=True).encode()
        return Explainer(method="llm", model=self.endpoint.model, prompt_sha256=hashlib.sha256(prompt).hexdigest())


def read_explanation(reply: ChatReply) -> str | None:
    """The explanation that an answer gives, on one clean line of bounded length, or None if there is none to read.

    It is still what a stranger wrote: text to show, never to obey.
    """
    answer = read_object(reply.text)
    text = answer.get("explanation") if answer is not None else None
    if not isinstance(text, str):
        return None
    line = clean_text(text, limit=MAX_EXPLANATION_CHARS)
    return line if re.search(r"\w{2}", line) else None
