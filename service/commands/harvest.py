"""`train harvest`: a model's activations on text, kept on disk for training."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feature_bank.errors import DataError
from service.commands.cluster import ClusterOption, stages_on
from service.commands.options import DataOption, JsonOption, ModelOption
from service.commands.terminal import error_console, output_console, plain, print_json

if TYPE_CHECKING:
    from training.cache import Harvest
    from training.texts import TextCounts

__all__ = ["harvest"]

LINE_SECONDS = 10.0


class TextFormat(StrEnum):
    """How the model reads a text."""

    CHAT = "chat"
    PLAIN = "plain"


def harvest(
    data: DataOption,
    hook_point: Annotated[
        list[str],
        typer.Option(
            "--hook-point", metavar="ID", help="Such as blocks.14.hook_resid_post. May be given several times."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The cache to write, or to go on with.")],
    model: ModelOption = None,
    text_format: Annotated[
        TextFormat, typer.Option("--format", help="As a user's message in the chat template, or as it stands.")
    ] = TextFormat.PLAIN,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of each text; the rest is cut off.")] = 512,
    total_tokens: Annotated[
        int | None, typer.Option("--total-tokens", min=1, help="Stop reading text at so many. Default: all of it.")
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", min=1, help="Of each file; an interruption costs two files at most.")
    ] = 16_384,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a model's activations at some hook points on disk, to train SAEs on.

    Run again after an interruption, it goes on with the first file that is missing.
    """
    for path in data:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check --data")

    import hashlib

    from feature_bank.identity import identify
    from guard.hook_points import resolve
    from guard.models import load_model
    from training.texts import read_texts

    with stages_on(cluster) as stages:  # what is wrong with it is said before the text is read
        loaded = load_model(model)
        hook_names = list(dict.fromkeys(hook_point))
        for name in hook_names:
            resolve(loaded.model, name)  # a wrong id is refused before the text is read
        identity = identify(loaded.model, loaded.tokenizer, loaded.model_id)
        tokenizer: Any = loaded.tokenizer
        sequences, counts = read_texts(
            data, tokenizer, text_format=text_format.value, max_tokens=max_tokens, total_tokens=total_tokens
        )
        files = []
        for path in data:
            with path.open("rb") as file:
                files.append({"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
        progress, said = error_console(), 0.0

        def report(done: int, total: int, tokens: int) -> None:
            nonlocal said
            now = time.monotonic()
            if done == total or now - said >= LINE_SECONDS:
                progress.print(f"harvest {done}/{total}: {tokens:,} tokens", markup=False)
                said = now

        cache = stages.harvest(
            loaded.model,
            sequences,
            hook_names,
            out,
            fingerprint={
                "model_id": identity.id,
                "model": identity.config_hash,
                "tokenizer": identity.tokenizer_hash,
                "text_format": text_format.value,
                "corpus": files,
            },
            shard_tokens=shard_tokens,
            on_shard=report,
        )
    found = _summary(cache, counts)
    if as_json:
        print_json(found)
        return
    console = output_console()
    console.print(f"{cache.tokens:,} tokens of {len(sequences):,} texts in {plain(str(out))}", markup=False)
    console.print(
        f"left out: {counts.special_tokens:,} special tokens, {counts.repeated:,} repeated and {counts.empty:,} empty "
        f"texts; {counts.cut:,} texts were cut at {max_tokens:,} tokens",
        markup=False,
        soft_wrap=True,
    )
    for name, hook in cache.summary.hook_points.items():
        console.print(
            f"{name}: width {hook.d_in:,}, median length {hook.median_length:.2f}, {hook.outliers:,} outliers",
            markup=False,
            soft_wrap=True,
        )


def _summary(cache: Harvest, counts: TextCounts) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(cache.folder),
        "manifest": dict(cache.manifest),
        "hook_points": {name: hook.model_dump() for name, hook in cache.summary.hook_points.items()},
        "bytes": sum(shard.bytes for shard in cache.summary.shards),
        "texts": asdict(counts),
    }
