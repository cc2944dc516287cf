"""A tokenizer read from its file alone, as far as `feature_bank.layout` uses one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_bank.errors import MissingExtraError
from guard.engines.onnx_sidecar import RUNTIME_EXTRA
from guard.errors import GuardError


class FileTokenizer:
    """The text half of a Hugging Face tokenizer: it knows no chat template."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, path: Path, special_ids: Sequence[int]) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtraError(f"the ONNX engine needs tokenizers: {RUNTIME_EXTRA}") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise GuardError(f"{path} cannot be read ({error}); export the bank again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as text, letter by letter
        self.all_special_ids = list(special_ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """The ids of untrusted text: the spelling of a special token in it is ordinary text."""
        return {"input_ids": [token for token, _ in self.spans(text)]}

    def spans(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """The ids of untrusted text, each with the characters that it stands for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: Any) -> Any:  # noqa: ARG002  # a protocol's
        """There is none: what the template puts before a text stands in the manifest."""
        raise GuardError("the exported tokenizer has no chat template; judge texts by their role")
