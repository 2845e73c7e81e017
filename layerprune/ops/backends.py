"""Which backend serves which device, and why not a faster one.

The operators of the library ``layerprune`` have an eager reference for every device. The compiled
part, once loaded, takes precedence for tensors on its device, the Triton kernels for those on a
CUDA device that it does not serve: the dispatcher chooses for each call.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from layerprune._version import __version__

VARIABLE = "LAYERPRUNE_BACKEND"
"""Environment variable: ``auto`` (default), ``eager``, ``compiled``: an error without the compiled
part for the CPU, or ``triton``: for CUDA, also where the compiled part is, and an error without."""

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Backend:
    """What runs the operations on one device.

    Attributes:
        name: "compiled", "triton" or "eager".
        detail: What was compiled and how, or why eager PyTorch serves.
        remedy: The command that brings the compiled part, where it could be had.
    """

    name: str
    detail: str
    remedy: str | None = None

    def __str__(self) -> str:
        mend = "" if self.remedy is None else f". To mend it: {self.remedy}"
        return f"{self.name}: {self.detail}{mend}"


class _Missing(Exception):
    """Nothing was compiled."""


class _NoTriton(Exception):
    """Why Triton's kernels cannot serve, and the command that brings them."""


class _Misfit(Exception):
    """What was compiled is for something else."""


def _obstacle(part: str = "obstacle") -> str:
    """Why the build compiled nothing, or with "cuda_obstacle" nothing for CUDA."""
    try:
        reason = json.loads((_PACKAGE / "build.json").read_text())[part]
    except (OSError, ValueError, KeyError):
        reason = None
    return reason or "it was not built here"


def _load() -> ModuleType:
    """Loads the compiled CPU kernels and returns the module that came with them."""
    # By its file: an import would go on to look in other places, such as an editable install.
    here = [_PACKAGE / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((path for path in here if path.exists()), None)
    if file is None:
        others = [path for path in _PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd")]
        if not others:
            raise _Missing(_obstacle())
        other, this = others[0].name.split(".")[1], sysconfig.get_config_var("SOABI")
        raise _Misfit(f"it was built for Python {other}, this is {this}")
    spec = importlib.util.spec_from_file_location("layerprune._C", file)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        version = sysconfig.get_python_version()
        raise _Misfit(f"{file.name} does not load into Python {version}: {error}") from None
    info = module.build_info()
    if info["layerprune"] != __version__:
        raise _Misfit(f"it was built for layerprune {info['layerprune']}, this is {__version__}")
    built = f"it was built with torch {info['torch']} for torch {info['torch_oldest']} and newer"
    if _release(torch.__version__) < _release(info["torch_oldest"]):
        raise _Misfit(f"{built}, this is torch {torch.__version__}")
    libraries = sorted(_PACKAGE.glob("_cpu.*"))
    if not libraries:
        raise _Misfit(f"{file.name} is there without the library _cpu that belongs to it")
    try:
        torch.ops.load_library(libraries[0])
    except OSError:
        raise _Misfit(f"{built}, and does not load into torch {torch.__version__}") from None
    return module


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _remedy(device: str = "cpu") -> str:
    """The command that installs this package again, compiled for the device."""
    source, editable = "path/to/layerprune", False
    if (_PACKAGE.parent / "setup.py").exists():  # imported from its sources, installed or not
        source, editable = str(_PACKAGE.parent), True
    else:
        try:
            record = importlib.metadata.distribution("layerprune").read_text("direct_url.json")
            origin = json.loads(record or "{}")
            folder = Path(url2pathname(urlparse(origin["url"]).path))
            if "dir_info" in origin and folder.exists():
                source = str(folder)
        except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
            pass
    what = ("-e " if editable else "") + shlex.quote(source)
    pip = f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation --no-deps"
    # Told to, the build does not pass over what it lacks, but says it.
    return f"LAYERPRUNE_BUILD={device} {pip} --force-reinstall {what}"


def _choose_cpu() -> tuple[Backend, ModuleType | None]:
    """Which backend serves the CPU, and the compiled module if it is in use."""
    wish = os.environ.get(VARIABLE) or "auto"
    if wish not in ("auto", "eager", "compiled", "triton"):
        raise ImportError(f"{VARIABLE} must be auto, eager, compiled or triton, got {wish!r}")
    if wish == "eager":
        return Backend("eager", f"{VARIABLE}=eager"), None
    try:
        module = _load()
    except (_Missing, _Misfit) as error:
        backend = Backend("eager", f"the compiled part is not in use, {error}", _remedy())
        if wish == "compiled":
            raise ImportError(f"{VARIABLE}=compiled: layerprune runs {backend}") from None
        if isinstance(error, _Misfit):
            warnings.warn(f"layerprune runs {backend}", RuntimeWarning, stacklevel=2)
        return backend, None
    info = module.build_info()
    detail = (
        f"{info['instruction_set']} kernels, built with torch {info['torch']}"
        f" for torch {info['torch_oldest']} and newer ({info['compiler']})"
    )
    return Backend("compiled", detail), module


def _load_cuda() -> None:
    """Loads the compiled CUDA kernels, which were built with the CPU's."""
    if native is None:
        raise _Missing(_CPU.detail)
    libraries = sorted(_PACKAGE.glob("_cuda.*"))
    if not libraries:
        raise _Missing(_obstacle("cuda_obstacle"))
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        raise _Misfit(
            f"{libraries[0].name} does not load into torch {torch.__version__}: {error}"
        ) from None


def _triton() -> str:
    """The Triton that is to serve."""
    if importlib.util.find_spec("layerprune.kernels") is None:
        reason = "Triton's kernels are missing in a source tree that is not installed"
        raise _NoTriton(reason, _remedy("auto"))
    try:
        return f"Triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        remedy = f"{shlex.quote(sys.executable)} -m pip install triton"
        raise _NoTriton("Triton is not installed", remedy) from None


def _choose_cuda() -> Backend:
    """Which backend serves CUDA: compiled kernels, or Triton's, if there is a GPU to run them."""
    wish = os.environ.get(VARIABLE)
    if wish == "eager":
        return Backend("eager", f"{VARIABLE}=eager")
    triton = None
    if wish == "triton":
        try:
            triton = Backend("triton", f"kernels by {_triton()}; {VARIABLE}=triton")
        except _NoTriton as lack:
            reason, remedy = lack.args
            raise ImportError(f"{VARIABLE}=triton: {reason}. To mend it: {remedy}") from None
    if not torch.cuda.is_available():
        return Backend("eager", "there is no GPU that torch can use")
    if triton is not None:
        return triton
    try:
        _load_cuda()
    except (_Missing, _Misfit) as error:
        reason = f"the compiled CUDA kernels are not in use, {error}"
        try:
            backend = Backend("triton", f"kernels by {_triton()}; {reason}", _remedy("cuda"))
        except _NoTriton as lack:
            backend = Backend("eager", f"{reason}, and {lack.args[0]}", _remedy("cuda"))
        if isinstance(error, _Misfit):
            warnings.warn(f"layerprune runs {backend} for CUDA", RuntimeWarning, stacklevel=2)
        return backend
    info = native.build_info()
    detail = f"built with torch {info['torch']} for torch {info['torch_oldest']} and newer"
    return Backend("compiled", f"CUDA kernels, {detail}")


_CPU, native = _choose_cpu()
_CUDA = _choose_cuda()


def backends() -> dict[str, Backend]:
    """What runs the operations, for each type of device.

    Returns:
        ``{"cpu": Backend, "cuda": Backend}``; a printed `Backend` says what it is, and where a
        faster one could be had, why it is not in use and the command that brings it.
    """
    return {"cpu": _CPU, "cuda": _CUDA}
