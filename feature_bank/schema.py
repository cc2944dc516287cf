"""The records of a bank's files, validated on reading. Unknown fields are refused: they would be silently ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from feature_bank.taxonomy import Domain

SCHEMA_VERSION = 1
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Record(BaseModel):
    """The base of all records: immutable, no unknown fields, no NaN or infinity anywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelIdentity(Record):
    """Which model a bank was made for."""

    id: str
    revision: str | None = None
    config_hash: Sha256
    tokenizer_hash: Sha256
    d_model: int = Field(gt=0)
    n_layers: int = Field(gt=0)


class HookRecord(Record):
    """One hook point: the full SAE it was cut from and how well its rows stand for that SAE."""

    hook_name: str
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    """Features of the full SAE; the index of a direction lies beyond them."""
    n_selected: int = Field(gt=0)
    n_directions: int = Field(default=0, ge=0)
    """How many of the selected rows are directions fitted to labels rather than features of the SAE."""
    sae_sha256: Sha256
    fvu: FiniteFloat
    """Fraction of variance unexplained by the full SAE in training form (lower is better)."""
    l0: FiniteFloat
    dead_fraction: Probability
    fires_precision: Probability
    """Of the (token, feature) pairs that the bank's rows and thresholds call active, the share active in the
    full SAE."""
    fires_recall: Probability


class CorpusRecord(Record):
    """A body of text that the bank was made from."""

    name: str
    licence: str
    sha256: Sha256
    rows: int = Field(ge=0)


class Canary(Record):
    """A short text and the mean normalised activation that each named feature must give on it."""

    text: str
    activations: dict[str, FiniteFloat] = Field(min_length=1)
    tolerance: float = Field(gt=0.0, lt=1.0)
    """Largest accepted relative error, ||found - recorded|| / ||recorded||."""


class Manifest(Record):
    """bank.json"""

    schema_version: Literal[1]
    name: str
    version: str
    created: str
    tool_version: str
    model: ModelIdentity
    hook_points: list[HookRecord] = Field(min_length=1)
    corpus: list[CorpusRecord]
    canary: Canary
    quality: dict[str, FiniteFloat] = Field(default_factory=dict)
    files: dict[str, Sha256]
    parent: str | None = None
    """The version that this one was made from by refitting, as `Bank.version` writes it."""
    sha256: Sha256
    """Of this file itself, with zeros in place of the digest; see `feature_bank.bank.seal`."""

    @model_validator(mode="after")
    def _distinct(self) -> Manifest:
        names = [hook.hook_name for hook in self.hook_points]
        if len(set(names)) != len(names):
            raise ValueError("hook_points names a hook point twice")
        return self


class Term(Record):
    """A token or n-gram that goes with a feature: its z-score against the rest, and in how many documents it occurs."""

    text: str
    z: FiniteFloat
    documents: int = Field(ge=0)


class Evidence(Record):
    """An excerpt of text written for the project on which the feature fires, and the token where it peaks."""

    text: str
    peak: str
    activation: FiniteFloat
    tokens: list[str] = Field(default_factory=list)
    """The excerpt's tokens in order, as text."""
    activations: list[FiniteFloat] = Field(default_factory=list)
    """The feature's normalised activation on each of `tokens`."""

    @model_validator(mode="after")
    def _aligned(self) -> Evidence:
        if len(self.tokens) != len(self.activations):
            raise ValueError("tokens and activations must have one entry a token")
        return self


class PredicateTerm(Record):
    """One term of an executable explanation, and what its occurrence in a segment adds to the log-odds."""

    kind: Literal["token", "ngram", "concept"]
    text: str
    weight: FiniteFloat


class Predicate(Record):
    """An explanation that can be run: p(fires) = sigmoid(bias + the weights of the terms that occur)."""

    terms: list[PredicateTerm] = Field(max_length=12)
    bias: FiniteFloat


class Explainer(Record):
    """Who wrote an explanation."""

    method: Literal["executable", "llm", "imported", "reviewer"]
    model: str | None = None
    prompt_sha256: Sha256 | None = None
    seed: int | None = None


class SimulationScore(Record):
    """How well an explanation predicts, on text that the explainer never saw, where the feature fires."""

    level: Literal["token", "segment"]
    simulator: str
    """`executable`, or the name of the language model."""
    n: int = Field(gt=0)
    """Tokens or segments that were scored."""
    missing: int = Field(default=0, ge=0)
    """Those for which the simulator gave no usable answer: left out, never counted as zero."""
    corr: FiniteFloat
    """Pearson's correlation of predicted and true activation: the CorrScore."""
    corr_low: FiniteFloat
    corr_high: FiniteFloat
    """95 % interval, by resampling documents."""
    corr_null: FiniteFloat
    """97.5th percentile of the same with the explanations of other features."""
    corr_null_mean: FiniteFloat
    auroc: Probability | None = None
    balanced_accuracy: Probability | None = None
    pr_auc: Probability | None = None
    """At the base rate at which the feature fires in the corpus, whatever share of the sample fires."""


class ConceptScore(Record):
    """How often a feature tells a concept's contrast pairs apart."""

    domain: Domain
    concept: str
    pairs: int = Field(gt=0)
    frequency: Probability
    """Share of the pairs where it fires on the text with the concept and not on its twin."""
    reverse: Probability
    """Share of the pairs where it is the other way round."""
    q: Probability
    """The test's p-value, adjusted for all features and concepts (Benjamini-Hochberg)."""


class Causality(Record):
    """What ablating the feature does to the domains' scores on texts where it fires."""

    texts: int = Field(gt=0)
    effects: dict[Domain, FiniteFloat]
    """Mean change of each domain's logit (negative: the score falls)."""
    low: dict[Domain, FiniteFloat]
    high: dict[Domain, FiniteFloat]
    """95 % interval of the mean."""


class Duplicate(Record):
    """Another feature of the bank that fires on nearly the same tokens."""

    id: str = Field(pattern=r"^L\d+/\d+$")
    correlation: FiniteFloat


class FeatureRecord(Record):
    """One line of features.jsonl."""

    id: str = Field(pattern=r"^L\d+/\d+$")
    hook_name: str
    layer: int = Field(ge=0)
    index: int = Field(ge=0)
    domains: list[Domain]
    concepts: list[str] = Field(default_factory=list)
    direction: str = ""
    """What it is the direction of, if it was fitted to labels: a domain, or `DOMAIN/CONCEPT`. Empty for an SAE's
    feature."""
    explanation: str
    explainer: Explainer | None = None
    predicate: Predicate | None = None
    kind: Literal["lexical", "conceptual"] | None = None
    lexicality: Probability | None = None
    """Share of the activation's variance over tokens that the token's identity alone explains."""
    trigger_tokens: list[Term] = Field(default_factory=list)
    ngrams: list[Term] = Field(default_factory=list)
    promoted_tokens: list[str] = Field(default_factory=list)
    """The tokens whose logits the decoder row raises most (logit lens)."""
    scores: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Detection, per domain: `auroc_<domain>`, its 95 % interval `..._low`, `..._high`, and `..._null` (labels
    shuffled); `selectivity_<domain>` and `..._low`: the AUROC against texts of other domains alone; `tpr_<domain>` and
    `lookalike_fpr_<domain>`: the share of the domain's texts, and of texts that only look like it, that lie above the
    value which one in twenty of the other texts exceeds."""
    fidelity: list[SimulationScore] = Field(default_factory=list)
    concept_scores: list[ConceptScore] = Field(default_factory=list)
    """The concepts that the feature tells apart, best first."""
    causality: Causality | None = None
    admitted: bool = True
    """Whether the preset's rules let it into the guard."""
    refusals: list[str] = Field(default_factory=list)
    """The rules that it fails."""
    duplicates: list[Duplicate] = Field(default_factory=list)
    threshold: FiniteFloat
    scale: float = Field(gt=0.0)
    """99.9th percentile of the activation on the training corpus; reported activations are divided by it."""
    density: Probability
    """Share of the corpus's tokens on which the feature fires."""
    quantiles: dict[str, FiniteFloat] = Field(default_factory=dict)
    histogram: list[int] = Field(default_factory=list)
    """Firing tokens in 20 equal bins of the normalised activation from 0 to 1; the last takes the rest."""
    evidence: list[Evidence] = Field(default_factory=list)


class Pooling(Record):
    """How per-token evidence becomes a score; see `feature_bank.heads`."""

    window: int = Field(gt=0)
    """Tokens in the causal moving average."""
    min_tokens: int = Field(gt=0)
    """A window's sum is divided by at least this many tokens, so that one odd token early on is not a verdict."""
    ceiling: float = Field(gt=0.0)
    """Normalised activations are clipped to this before they are averaged, so that no single spike decides."""
    evidence_tokens: int = Field(gt=0)
    """Consecutive tokens that must agree: a text's score is the best that so many tokens in a row all reach."""
    settle_tokens: int = Field(default=1, gt=0)
    """The first token of a response, counted from 1, whose average counts while it streams; of a shorter response the
    last does."""
    streaming_window: int | None = Field(default=None, gt=0)
    """Tokens in the moving average of a response that streams; as many as `window` if left out."""

    @property
    def streamed(self) -> Pooling:
        """As a response that streams is pooled: `window` is that of streaming."""
        return self.model_copy(update={"window": self.streaming_window or self.window})


class Calibration(Record):
    """probability = sigmoid(slope * logit + intercept)."""

    slope: float = Field(gt=0.0)
    intercept: FiniteFloat


class StreamingHead(Record):
    """Weights for a response that streams, over the features of the domain's head: fitted on windows of text as short
    as its moving average is then."""

    weights: list[FiniteFloat]
    bias: FiniteFloat
    calibration: Calibration


class HeadRecord(Record):
    """One domain's sparse linear head over pooled features."""

    features: list[str] = Field(min_length=1)
    weights: list[FiniteFloat]
    bias: FiniteFloat
    calibration: Calibration
    thresholds: dict[str, Probability]
    """For texts that lie there whole: the probability that the share of negatives named by the key (a false-positive
    rate) reaches."""
    streaming_thresholds: dict[str, Probability]
    """The same for a response that is judged token by token: over its many prefixes a score peaks higher."""
    steering: list[FiniteFloat]
    """Per feature its share in the domain's mean difference, in units of the activation: sum_f share_f * W_dec[f]
    leads from text without the domain to text with it. Features above 0 steer the domain."""
    streaming: StreamingHead | None = None
    """None: a response that streams is judged by the same weights."""

    @model_validator(mode="after")
    def _aligned(self) -> HeadRecord:
        streamed = self.weights if self.streaming is None else self.streaming.weights
        if not len(self.features) == len(self.weights) == len(self.steering) == len(streamed):
            raise ValueError("features, weights and steering must have one entry a feature")
        if len(set(self.features)) != len(self.features):
            raise ValueError("features names a feature twice")
        return self


class Heads(Record):
    """heads.json"""

    pooling: Pooling
    heads: dict[Domain, HeadRecord] = Field(min_length=1)
