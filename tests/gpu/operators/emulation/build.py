"""Compiles the CUDA kernels and their bindings for the host: operators ``layerprune_emulated::*``.

The sources are those of ``csrc/``, where ``<<<>>>`` and ``__shared__`` become calls of what
``cuda_runtime.h`` beside this file declares. Of CUDA only the headers of its number types are
needed, which compute on the host as well. CFLAGS and LDFLAGS are honoured, as for a sanitizer.
"""

import ctypes
import fcntl
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[3]
REWRITTEN = (
    (r"__shared__ ([\w:]+) (\w+)((?:\[[^\]]+\])*);", r"auto& \2 = emulated::shared<\1\3>([] {});"),
    (
        r"(\w+(?:<[^;]*?>)?)<<<([^;]*?)>>>\(([^;]*?)\);",
        r"emulated::launch({\2}, [&] { \1(\3); });",
    ),
    (r"\(layerprune, CUDA, m\)", "(layerprune_emulated, CPU, m)"),
)


def cuda_headers() -> Path | None:
    """Where CUDA's headers are: the toolkit's, or those of NVIDIA's packages."""
    homes = [os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME]
    if nvcc := shutil.which("nvcc"):  # maybe a script elsewhere: it says where its toolkit is
        command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True).stderr
        homes += re.findall(r"TOP=(.+)", told)
    folders = [Path(home, "include") for home in homes if home]
    for package in importlib.metadata.distributions():
        if (package.metadata["Name"] or "").startswith("nvidia-cuda-runtime"):
            folders += {
                Path(package.locate_file(file)).parent
                for file in package.files or ()
                if file.name == "vector_types.h"
            }
    needed = ("cuda_fp16.h", "cuda_bf16.h", "vector_types.h", "crt/host_defines.h")
    return next((f for f in folders if all((f / name).exists() for name in needed)), None)


def obstacle() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if cuda_headers() is None:
        return "needs CUDA's headers (CUDA_HOME says where they are)"
    if shutil.which(shlex.split(cpp_extension.get_cxx_compiler())[0]) is None:
        return "needs a C++ compiler"
    return None if cpp_extension.is_ninja_available() else "needs ninja"


def rewrite(folder: Path) -> list[str]:
    """Writes the sources for the host; returns the files to compile."""
    sources = {path: path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.*")}
    sources = {path: to for path, to in sources.items() if to.parts[0] in ("cuda", "bindings")}
    headers = {path: Path(path.name) for path in (ROOT / "csrc").glob("*.h")}
    compiled = [str(HERE / "emulation.cpp")]
    for path, to in {**sources, **headers, HERE / "faults.cu": Path("faults.cu")}.items():
        if path.name in ("cpu.cpp", "python.cpp"):
            continue
        ours = HERE / path.name  # there is one for stream.h
        text = (ours if ours.exists() else path).read_text()
        for pattern, replacement in REWRITTEN:
            text = re.sub(pattern, replacement, text, flags=re.DOTALL)
        target = folder / to
        if target.suffix == ".cu":
            target = target.with_suffix(".cu.cpp")  # bindings/ has files of the same names
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:  # else it need not be compiled again
            target.write_text(text)
        if target.suffix == ".cpp":
            compiled.append(str(target))
    return sorted(compiled)


def load() -> ctypes.CDLL:
    """Builds and loads the operators; returns their library, with its functions in C."""
    library = torch.library.Library("layerprune_emulated", "DEF")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("layerprune::"):
            schema = getattr(torch.ops.layerprune, name.partition("::")[2]).default._schema
            library.define(str(schema).partition("::")[2])
    flags = shlex.split(os.environ.get("CFLAGS", ""))
    folder = ROOT / "build" / ("emulated-sanitized" if "-fsanitize" in str(flags) else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    with open(f"{folder}.lock", "w") as lock:  # of tests in several processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        cpp_extension.load(
            "layerprune_emulated",
            rewrite(folder),
            extra_cflags=["-O1", "-fvisibility=hidden", *flags],
            extra_ldflags=shlex.split(os.environ.get("LDFLAGS", "")),
            extra_include_paths=[str(HERE), str(cuda_headers())],
            build_directory=str(folder),
            is_python_module=False,
        )
    load.library = library  # its operators live as long as it does
    return ctypes.CDLL(str(folder / "layerprune_emulated.so"))
