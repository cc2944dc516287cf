"""A sweep: one YAML file that names many SAEs, the way from text to them, and the table of what became of them."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feature_bank.atomic import atomic_file
from feature_bank.errors import DataError, SailguardError
from feature_bank.schema import ModelIdentity
from guard.hook_points import parse_hook_name, resolve
from training.architectures import StepStats
from training.cache import Harvest
from training.reader import ActivationReader
from training.run_state import resolve_options
from training.runs import SaeRun, TrainerConfig, label
from training.stages import HERE, Stages
from training.texts import TextFormat, read_texts
from training.trainer import TrainedSae

Reporter = Callable[[str, int, int, str], None]
"""report(stage, done, total, detail): called often; `done == total` ends the stage."""

RESULTS = "results"
"""Name of the table's files in the output folder, without `.json` and `.csv`."""
PREFIX = "sweep-"
"""With what the names of the shipped sweeps begin."""
FIGURES = ("fvu", "l0", "dead_fraction", "tokens_per_second", "steps", "tokens", "seconds")
_PRESETS = Path(__file__).parent / "presets"


Beta = Annotated[float, Field(ge=0, lt=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Group(_Settings):
    """SAEs that differ in what `sweep` lists: every combination of its values is trained at every hook point."""

    architecture: str = "batch_topk"
    hook_points: tuple[str, ...] = ()
    """Default: those of the whole sweep."""
    hook_points_out: tuple[str, ...] = ()
    """For transcoders: what is predicted at each of `hook_points`."""
    options: dict[str, Any] = {}
    """The architecture's own settings."""
    sweep: dict[str, list[Any]] = {}
    """Values by setting; a setting is an option of the architecture or one of the fields below."""
    seed: int = Field(default=0, ge=0)
    expansion: int = Field(default=8, ge=1, le=1024)
    d_sae: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1.2e-3, gt=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    decay: Literal["linear", "cosine"] = "linear"
    clip_norm: float | None = Field(default=1.0, gt=0)
    dead_after_tokens: int = Field(default=100_000, ge=1)

    @field_validator("sweep")
    @classmethod
    def _lists_values(cls, axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for axis, values in axes.items():
            if axis in _NOT_SWEPT:
                raise ValueError(f"{axis!r} cannot be swept; write another group")
            if not values:
                raise ValueError(f"{axis!r} lists no value")
        return axes

    @model_validator(mode="after")
    def _one_output_an_input(self) -> Group:
        if self.hook_points_out and len(self.hook_points_out) != len(self.hook_points):
            raise ValueError(
                f"'hook_points_out' names {len(self.hook_points_out)} hook points for {len(self.hook_points)} in "
                "'hook_points'; it needs one for each"
            )
        return self


_NOT_SWEPT = {"architecture", "hook_points", "hook_points_out", "options", "sweep"}
_TRAINER_FIELDS = set(Group.model_fields) - _NOT_SWEPT


class Sweep(_Settings):
    """All SAEs of a sweep; they share the cache, the batches and their order."""

    hook_points: tuple[str, ...] = Field(min_length=1)
    saes: tuple[Group, ...] = Field(min_length=1)
    text_format: TextFormat = "plain"
    max_tokens: int = Field(default=512, ge=1)
    """Of a text, at most."""
    total_tokens: int | None = Field(default=None, ge=1)
    """Reading ends with the row that reaches so many."""
    memory_mb: int = Field(default=1024, ge=1, le=2048)
    """What the reader of the activations may hold."""
    batch_tokens: int = Field(default=2048, ge=1)
    epochs: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    """Of the order of the data."""
    device: str | None = None
    autocast: bool | None = None
    compile: bool = False
    prefetch: int | None = Field(default=None, ge=0)
    checkpoint_every: int = Field(default=100, ge=1)
    checkpoint_seconds: float = Field(default=60.0, ge=0)

    @property
    def all_hook_points(self) -> tuple[str, ...]:
        """Every hook point that some SAE reads or predicts, each once."""
        names = [
            name for group in self.saes for name in (*(group.hook_points or self.hook_points), *group.hook_points_out)
        ]
        return tuple(dict.fromkeys(names))

    @model_validator(mode="after")
    def _hook_points_are_known(self) -> Sweep:
        for name in (*self.hook_points, *self.all_hook_points):
            try:
                parse_hook_name(name)
            except SailguardError as e:
                raise ValueError(f"'hook_points': {e}") from e
        return self

    def runs(self) -> list[SaeRun]:
        """Every SAE, hook point by hook point. Raises DataError naming the field that is wrong."""
        runs = []
        for number, group in enumerate(self.saes):
            for chosen in _combinations(group):
                config = self._config(number, group, chosen)
                sources = group.hook_points or self.hook_points
                targets = group.hook_points_out or (None,) * len(sources)
                for source, target in zip(sources, targets, strict=True):
                    runs.append(SaeRun(source, config, target, name=f"{source}/{label(config, tuple(group.sweep))}"))
        seen: set[str] = set()
        for run in runs:
            if run.name in seen:
                raise DataError(f"field 'saes': two SAEs are {run.name!r}; let them differ in an option or the seed")
            seen.add(run.name)
        order = {name: position for position, name in enumerate(self.all_hook_points)}
        return sorted(runs, key=lambda run: order[run.hook_name])

    def _config(self, number: int, group: Group, chosen: dict[str, Any]) -> TrainerConfig:
        """The settings of one combination."""
        fields = {axis: value for axis, value in chosen.items() if axis in _TRAINER_FIELDS}
        options = {**group.options, **{axis: value for axis, value in chosen.items() if axis not in _TRAINER_FIELDS}}
        place = f"saes.{number}"
        try:
            merged = Group.model_validate(group.model_dump(include=_TRAINER_FIELDS) | fields)
        except ValidationError as e:
            first = e.errors()[0]
            raise DataError(f"field '{place}.sweep.{first['loc'][0]}': {first['msg']}") from e
        config = TrainerConfig(
            architecture=group.architecture,
            options=options,
            **{name: getattr(merged, name) for name in _TRAINER_FIELDS},
            **{name: getattr(self, name) for name in _SHARED},
        )
        try:
            resolve_options(SaeRun(self.hook_points[0], config, name=place))
        except DataError as e:
            raise DataError(str(e).replace(f"{place}, field '", f"field '{place}.", 1)) from e
        return config


_SHARED = (
    "batch_tokens",
    "epochs",
    "device",
    "autocast",
    "compile",
    "prefetch",
    "checkpoint_every",
    "checkpoint_seconds",
)


def _combinations(group: Group) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*group.sweep.values()):
        yield dict(zip(group.sweep, values, strict=True))


def load_sweep(name: str) -> Sweep:
    """A sweep's YAML file by path, or a shipped one by name. Raises DataError naming the file and the field."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else _PRESETS / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in _PRESETS.glob(f"{PREFIX}*.yaml")))
        raise DataError(f"{name}: no such file; shipped sweeps are {shipped}")
    try:
        sweep = Sweep.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        sweep.runs()
    except ValidationError as e:
        first = e.errors()[0]
        place = f", field {'.'.join(map(str, first['loc']))!r}" if first["loc"] else ""
        raise DataError(f"{path}{place}: {first['msg']}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not valid YAML: {e}") from e
    except DataError as e:
        raise DataError(f"{path}, {e}") from e
    return sweep


def train_sweep(
    sweep: Sweep,
    *,
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    data: Sequence[Path],
    out: Path,
    report: Reporter,
    stages: Stages = HERE,
) -> list[TrainedSae]:
    """Harvest the model's activations on the texts of `data`, and train all SAEs of the sweep in one pass over them.

    Below `out`: `activations`, `saes/HOOK POINT/NAME` (SAELens folders), `results.json` and `results.csv`. Run again
    after an interruption, nothing that is finished is done twice; so a sweep to which SAEs were added trains those.
    stages: who harvests and trains, by default this process.

    Raises DataError for bad rows, too little text, a sweep that does not fit, or a folder of other text or model.
    """
    sweep.runs()  # refuses a wrong field before hours of harvesting
    for name in sweep.all_hook_points:
        resolve(model, name)
    sequences, counts = read_texts(
        data, tokenizer, text_format=sweep.text_format, max_tokens=sweep.max_tokens, total_tokens=sweep.total_tokens
    )
    report("text", 1, 1, f"{len(sequences):,} of {counts.rows:,} texts, {counts.kept_tokens:,} tokens")
    cache = stages.harvest(
        model,
        sequences,
        sweep.all_hook_points,
        out / "activations",
        fingerprint={
            "model_id": identity.id,
            "model": identity.config_hash,
            "tokenizer": identity.tokenizer_hash,
            "text_format": sweep.text_format,
        },
        on_shard=lambda done, total, tokens: report("harvest", done, total, f"{tokens:,} tokens"),
    )
    return train_cached(sweep, cache, out, report=report, model_name=identity.id, stages=stages)


def train_cached(
    sweep: Sweep,
    cache: Harvest,
    out: Path,
    *,
    report: Reporter,
    model_name: str | None = None,
    stages: Stages = HERE,
) -> list[TrainedSae]:
    """Train the SAEs of the sweep on activations that were harvested before. See `train_sweep`."""
    runs = sweep.runs()
    model_name = str(cache.manifest.get("model_id", "")) if model_name is None else model_name
    reader = ActivationReader(
        cache,
        sweep.all_hook_points,
        batch_tokens=sweep.batch_tokens,
        seed=sweep.seed,
        memory_bytes=sweep.memory_mb << 20,
    )
    made: dict[str, int] = {}
    total = len(runs) * sweep.epochs * reader.steps_per_epoch

    def on_step(run: SaeRun, step: int, steps: int, stats: StepStats) -> None:
        made[run.name] = step
        report("train", sum(made.values()), total, f"step {step:,} of {steps:,}, fvu {stats.fvu:.3f} at {run.name}")

    trained = stages.train_saes(reader, runs, out, on_step=on_step, model_name=model_name)
    write_results(trained, out)
    report("train", total, total, f"{len(trained)} SAEs on {reader.tokens:,} tokens ({reader.outliers:,} outliers not)")
    return trained


def rows(trained: Sequence[TrainedSae]) -> list[dict[str, Any]]:
    """One flat row an SAE: what it is, where it lies, and its figures."""
    return [
        {
            "name": sae.run.name,
            "hook_name": sae.run.hook_name,
            "hook_name_out": sae.run.hook_name_out,
            "architecture": sae.run.config.architecture,
            "options": dict(sae.run.config.options),
            "seed": sae.run.config.seed,
            "lr": sae.run.config.lr,
            **{name: sae.figures[name] for name in FIGURES},
        }
        for sae in trained
    ]


def write_results(trained: Sequence[TrainedSae], folder: Path) -> None:
    """Write `results.json` and `results.csv`, in which each option has a column of its own."""
    table = rows(trained)
    with atomic_file(folder / f"{RESULTS}.json") as tmp:
        tmp.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    flat = [
        {key: value for key, value in row.items() if key != "options"}
        | {f"options.{key}": value for key, value in row["options"].items()}
        for row in table
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in flat for key in row)))
    writer.writeheader()
    writer.writerows(flat)
    with atomic_file(folder / f"{RESULTS}.csv") as tmp:
        tmp.write_text(text.getvalue(), encoding="utf-8")
