"""Reading foreign files without trusting them: JSON, safetensors, npz and torch archives, as checked tensors.

Archives are read with `weights_only=True` and `allow_pickle=False`: a file can hold tensors, never code.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from feature_bank.errors import BankError

__all__ = ["JsonFile", "LayerFiles", "TensorFile", "same_dtype"]

# All that reading a damaged archive has been seen to raise, besides OSError.
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


class JsonFile:
    """A JSON object on disk whose fields are read by name and type; nested fields as `trainer.k`."""

    def __init__(self, path: Path, *, hint: str = "") -> None:
        """Read it; `hint` says what a folder of the format holds. Raises BankError naming the file."""
        self.path = path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise BankError(f"{e.strerror or e}{hint and '; '}{hint}", file=str(path)) from e
        except (ValueError, RecursionError) as e:
            raise BankError(f"is not valid JSON: {e}", file=str(path)) from e
        if not isinstance(data, dict):
            raise BankError("must hold a JSON object", file=str(path))
        self.data: dict[str, Any] = data

    def error(self, field: str, message: str) -> BankError:
        """An error that names this file and the field."""
        return BankError(message, file=str(self.path), field=field)

    def get(self, field: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `field`; `default` if it is absent or null. Raises BankError for a value of another type."""
        value: Any = self.data
        for part in field.split("."):
            if not isinstance(value, dict):
                raise self.error(field, f"{part!r} cannot be read; what holds it is no object")
            value = value.get(part)
            if value is None:
                return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(field, f"{value!r} is not {_KINDS[kinds[-1]]}")
        return value

    def need(self, field: str, kind: type | tuple[type, ...], remedy: str = "") -> Any:
        """As `get`, but a missing field is an error; `remedy` says what to do about it."""
        value = self.get(field, kind)
        if value is None:
            raise self.error(field, f"missing{remedy and '; '}{remedy}")
        return value

    def expect(self, field: str, found: int) -> None:
        """Raise BankError if the file states another size than the tensors have."""
        stated = self.get(field, int)
        if stated is not None and stated != found:
            raise self.error(field, f"{stated} is not that of the weights, {found}")


class TensorFile:
    """The tensors of a file, taken out one by one by name and shape."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path = path
        self._left = dict(tensors)

    @classmethod
    def safetensors(cls, path: Path, *, hint: str = "") -> TensorFile:
        """Read a safetensors file. Raises BankError naming it."""
        return cls(path, _read(path, load_file, hint))

    @classmethod
    def torch(cls, path: Path) -> TensorFile:
        """Read a torch archive of tensors by name. Raises BankError, also if anything in it is not plain data."""
        return cls(path, _read(path, _load_torch, ""))

    @classmethod
    def npz(cls, path: Path) -> TensorFile:
        """Read a numpy archive of arrays by name. Raises BankError, also if an array holds objects."""
        return cls(path, _read(path, _load_npz, ""))

    def __contains__(self, name: str) -> bool:
        return name in self._left

    @property
    def names(self) -> list[str]:
        """What has not been taken yet."""
        return sorted(self._left)

    def error(self, field: str, message: str) -> BankError:
        """An error that names this file and the tensor."""
        return BankError(message, file=str(self.path), field=field)

    def take(self, name: str, shape: tuple[int | str, ...]) -> Tensor:
        """The tensor `name`; a dimension given as a name may have any size above zero.

        Raises BankError if it is missing, no floating-point tensor, of another shape, or not finite.
        """
        tensor = self._pop(name)
        if not tensor.is_floating_point():
            raise self.error(name, f"dtype {tensor.dtype} is no floating point")
        self._check_shape(name, tensor, shape)
        if not bool(torch.isfinite(tensor).all()):
            raise self.error(name, "the tensor holds NaN or infinity")
        return tensor

    def take_number(self, name: str) -> float:
        """The single value of `name`, whatever its dtype. Raises BankError as `take` does."""
        tensor = self._pop(name)
        if tensor.numel() != 1 or tensor.is_complex():
            raise self.error(name, f"shape {tuple(tensor.shape)} is not a single number")
        value = float(tensor.item())
        if not np.isfinite(value):
            raise self.error(name, "the tensor holds NaN or infinity")
        return value

    def drop(self, names: Iterable[str]) -> None:
        """Leave tensors out that have no part in encode or decode."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Raise BankError for a tensor that nobody took: it might change what the SAE computes."""
        if self._left:
            name = self.names[0]
            raise self.error(name, "is no tensor of this format, so what the SAE computes is not known")

    def _pop(self, name: str) -> Tensor:
        if name not in self._left:
            raise self.error(name, f"the tensor is missing; the file holds {', '.join(self.names)[:300] or 'none'}")
        tensor = self._left.pop(name)
        if not isinstance(tensor, Tensor):
            raise self.error(name, f"{type(tensor).__name__} is no tensor")
        return tensor.detach()

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
        found = tuple(tensor.shape)
        fits = len(found) == len(shape) and all(
            n > 0 if isinstance(want, str) else n == want for n, want in zip(found, shape, strict=True)
        )
        if not fits:
            raise self.error(name, f"shape {found} is not ({', '.join(map(str, shape))})")


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the widest dtype among them, which changes no value."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


def _read(path: Path, load: Callable[[Path], Mapping[str, Any]], hint: str) -> Mapping[str, Any]:
    try:
        return load(path)
    except OSError as e:
        raise BankError(f"{e.strerror or e}{hint and '; '}{hint}", file=str(path)) from e
    except pickle.UnpicklingError as e:
        raise BankError(
            "holds something else than tensors (perhaps code), or is no torch archive; it was not run and is refused",
            file=str(path),
        ) from e
    except _DAMAGED as e:
        reason = str(e).splitlines()[0] if str(e) else repr(e)
        raise BankError(f"unreadable, perhaps half-written: {reason}", file=str(path)) from e


def _load_torch(path: Path) -> Mapping[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of unusual pickles; they are read safely or refused all the same
        data = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(data, Mapping):
        raise ValueError(f"it holds a {type(data).__name__}, not tensors by name")
    return {str(name): value for name, value in data.items()}


def _load_npz(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:  # numpy leaves a damaged file open that it opened itself
        data = np.load(file, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array, not arrays by name")
        with data:
            return {name: torch.from_numpy(np.ascontiguousarray(data[name])) for name in data.files}


class LayerFiles:
    """The files of a release that holds one SAE a layer, by a name with the layer's number in place of `N`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pattern = re.compile(re.escape(name).replace("N", r"(\d+)"))

    def matches(self, path: Path) -> bool:
        """Whether the path is such a file, or a folder that holds one."""
        return bool(self._within(path)) if path.is_dir() else self._pattern.fullmatch(path.name) is not None

    def only(self, path: Path) -> Path:
        """The path, or the one such file in it if it is a folder. Raises BankError if it holds several or none."""
        if not path.is_dir():
            return path
        files = self._within(path)
        if len(files) != 1:
            raise BankError(f"holds {len(files)} files {self._name}; name one of them", file=str(path))
        return files[0]

    def layer(self, path: Path) -> int | None:
        """The layer that the file's name tells."""
        found = self._pattern.fullmatch(path.name)
        return None if found is None else int(found[1])

    def _within(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if self._pattern.fullmatch(path.name))
