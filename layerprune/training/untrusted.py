"""Files that somebody else may have made: read within bounds, and nothing in them is run.

Every function raises `ValueError` (or what opening the file raises) for what it does not read; the
callers add which file it was.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "parsed_json",
    "parsed_yaml",
    "read_text",
    "read_torch",
    "sha256",
    "tensor_shapes",
    "what_failed",
    "write_torch",
]

YAML_LIMIT = 1 << 16
"""Bytes of a YAML file at the most; its parser is slow."""
TABLE_LIMIT = 1 << 26
"""Bytes of a table or a summary at the most."""
_HEADER_LIMIT = 1 << 24
"""Bytes of what describes the tensors of a file: hundreds of thousands of them."""
_VALUES_LIMIT = 1 << 22
"""Values in a file of torch.save at the most, each counted wherever it occurs."""
_NESTED = dict | list | tuple | set | Tensor

# What PyYAML and torch.load raise on a file that is cut short, of another format, or made to harm.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)

# What torch.save writes for tensors and plain containers. torch.load itself takes more, among it
# calls that allocate as much as they are told to, and that of a codec, by which bytes are saved and
# which doubles them as often as it is named.
_PICKLED = {"collections OrderedDict", "collections Counter", "torch Size", "torch device"}
_PICKLED |= {"__builtin__ set", "__builtin__ complex"}
_PICKLED |= {f"torch._utils {name}" for name in ("_rebuild_tensor_v2", "_rebuild_parameter")}
_PICKLED |= {
    f"torch {storage.__name__}"
    for storage in torch._storage_classes
    if storage not in (torch.storage.TypedStorage, torch.storage.UntypedStorage)
}
_PICKLED |= {str(d).replace(".", " ") for d in vars(torch).values() if isinstance(d, torch.dtype)}
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases: a few lines of them stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read: write the value out")
        return super().compose_node(parent, index)


def what_failed(error: BaseException) -> str:
    """An error's message in one line that is not too long, whatever of the file it repeats."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_text(path: Path, limit: int) -> str:
    """The content of a text file (UTF-8) of at most ``limit`` characters."""
    with open(path, encoding="utf-8") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise ValueError(f"it is longer than {limit} characters")
    return text


def parsed_json(text: str) -> Any:
    """The value of a JSON text; NaN and infinity, which are none, are refused."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parsed_yaml(text: str) -> Any:
    """The value of a YAML text that has only plain types and no aliases."""
    if len(text) > YAML_LIMIT:
        raise ValueError(f"it is longer than {YAML_LIMIT} characters")
    try:
        return yaml.load(text, _Loader)
    except _NOT_YAML as error:
        raise ValueError(what_failed(error)) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (as safetensors names it) and shape of every tensor of a file, from its header alone.

    The header's offsets are checked against the file's size.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_LIMIT:
        raise ValueError(f"its header claims {length} bytes")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(what_failed(error)) from error


def write_torch(content: Any, path: Path) -> None:
    """Writes what `read_torch` reads.

    Raises:
        ValueError: if it would not be read back; the file is of no use then.
    """
    try:
        torch.save(content, path)
        _check_archive(path)
        _check_sizes(content)
    except (AttributeError, TypeError, ValueError, pickle.PicklingError) as error:
        raise ValueError(what_failed(error)) from error


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote of tensors, numbers, text and containers of them; to the CPU."""
    try:
        _check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(found)
    except _UNREADABLE as error:
        raise ValueError(what_failed(error)) from error
    return found


def _check_sizes(content: Any) -> None:
    """Refuses what takes more memory than its file as soon as somebody copies it.

    Such are tensors of more elements than they have memory for, by a stride of 0, and containers
    that hold each other many times over.
    """
    # Level by level: an object that stands often in a level is looked at once.
    level, count = {id(content): (content, 1)}, 0
    while level:
        below: dict[int, tuple[Any, int]] = {}
        for value, times in level.values():
            if isinstance(value, Tensor):
                held = value.untyped_storage().nbytes()
                if value.numel() * value.element_size() > held:
                    raise ValueError(
                        f"a tensor of shape {list(value.shape)} has only {held} bytes of its own: "
                        "save its clone()"
                    )
                continue
            count += times * len(value)
            if count > _VALUES_LIMIT:
                raise ValueError(f"it holds more than {_VALUES_LIMIT} values")
            for child in [*value, *value.values()] if isinstance(value, dict) else value:
                if isinstance(child, _NESTED):
                    below[id(child)] = child, times + below.get(id(child), (child, 0))[1]
        level = below


def _check_archive(path: Path) -> None:
    """Refuses a file of `torch.save` that names code, or would take more memory than its size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size or any(
            entry.compress_type != zipfile.ZIP_STORED for entry in entries
        ):
            raise ValueError("its parts are larger than the file")
        names = [entry.filename for entry in entries]
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(set(names)) < len(names) or len(pickles) != 1:
            raise ValueError("it is no file of torch.save")
        if pickles[0].file_size > _HEADER_LIMIT:
            raise ValueError(f"its directory claims {pickles[0].file_size} bytes")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if operation.name in _IMPORTS and argument not in _PICKLED:
                raise ValueError(f"it holds {argument or operation.name}, which is no plain value")
