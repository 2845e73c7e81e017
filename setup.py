"""What pyproject.toml cannot say: where `layerprune.kernels` comes from, and the compiled part.

LAYERPRUNE_BUILD says what is compiled:
  auto  (default) the CPU kernels where torch and a C++ compiler are there, and the CUDA kernels
        where besides nvcc and a torch with CUDA are (no GPU is needed); what cannot be built is
        left out: the package installs all the same, and `layerprune info` says what is missing
  cpu   the CPU kernels, or the build fails
  cuda  the CPU and the CUDA kernels, or the build fails
  none  nothing
MAX_JOBS bounds how many files are compiled at a time; CXX, CFLAGS and TORCH_CUDA_ARCH_LIST are
honoured.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

# Without build isolation nobody else checks this, and older ones fail on the licence's new form.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"layerprune builds with setuptools >= 77, this is {setuptools.__version__}: "
        "run pip install --upgrade setuptools"
    )

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'= "(.+)"', (ROOT / "layerprune" / "_version.py").read_text())[1]
TORCH_OLDEST = (2, 10)  # the oldest torch that has all of the stable ABI that csrc/ uses
# What the CUDA kernels are compiled for, as far as nvcc knows it; a newer GPU compiles the last
# one's PTX for itself.
CUDA_ARCHITECTURES = (80, 90, 100)
SHARED = [f"csrc/bindings/{n}.cpp" for n in ("gates", "gather", "indices", "residual", "rows")]
CHOICES = ("auto", "cpu", "cuda", "none")
CHOICE = os.environ.get("LAYERPRUNE_BUILD") or "auto"
if not os.environ.get("CXX", "c++").strip():
    del os.environ["CXX"]  # empty is unset


def obstacle() -> str | None:
    """Why nothing can be compiled here, or None."""
    if CHOICE not in CHOICES:
        raise SystemExit(f"LAYERPRUNE_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}")
    if CHOICE == "none":
        return "LAYERPRUNE_BUILD=none left the compiled part out"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return "the build had no torch to compile against, as in an isolated build"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < TORCH_OLDEST:
        oldest = ".".join(map(str, TORCH_OLDEST))
        return f"the build had torch {torch.__version__}, older than {oldest}"
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"the build found no C++ compiler ({compiler})"
    return None


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be compiled where the others can, or None."""
    if CHOICE == "cpu":
        return "LAYERPRUNE_BUILD=cpu left the CUDA kernels out"
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return f"the build had torch {torch.__version__}, which is without CUDA"
    home = cuda_home()
    if home is None:
        return "the build found no nvcc with CUDA's headers (CUDA_HOME says where they are)"
    cpp_extension.CUDA_HOME = str(home)
    found = re.search(r"release (\d+)\.", run_nvcc("--version"))
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        ours = "an unknown version" if found is None else f"CUDA {found[1]}"
        return f"nvcc is of {ours} and torch of CUDA {torch.version.cuda}"
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit: torch's guess, or where the nvcc on the path says that it is."""
    from torch.utils import cpp_extension

    guesses = [] if cpp_extension.CUDA_HOME is None else [Path(cpp_extension.CUDA_HOME)]
    if "CUDA_HOME" not in os.environ and (found := shutil.which("nvcc")) is not None:
        # A link or a script in a common folder leads torch astray.
        command = [found, "--dryrun", "-E", "-x", "cu", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True).stderr
        guesses += [Path(top).resolve() for top in re.findall(r"TOP=(.+)", told)]
    needed = ("bin/nvcc", "include/cuda_runtime_api.h")
    complete = (home for home in guesses if all((home / file).exists() for file in needed))
    return next(complete, None)


def run_nvcc(option: str) -> str:
    from torch.utils import cpp_extension

    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    return subprocess.run([nvcc, option], capture_output=True, text=True).stdout


def architecture_flags() -> list[str]:
    """What to compile for; nothing where torch reads TORCH_CUDA_ARCH_LIST itself."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    known = run_nvcc("--list-gpu-code").split()
    chosen = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    newest = chosen[-1]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_library(flags: list[str], headers: list[str]) -> setuptools.Extension:
    """The CUDA kernels as a library of their own: it needs CUDA's where it is loaded."""
    from torch.utils import cpp_extension

    device_flags = ["-O3", "-Xcompiler=-fvisibility=hidden", *architecture_flags()]
    return cpp_extension.CUDAExtension(
        "layerprune._cuda",
        [*sorted(map(str, Path("csrc/cuda").glob("*.cu"))), *SHARED, "csrc/bindings/cuda.cpp"],
        depends=headers,
        define_macros=[("USE_CUDA", None)],  # for the stream in torch's C interface
        extra_compile_args={"cxx": flags, "nvcc": device_flags},
        py_limited_api=True,
    )


def extensions() -> list[setuptools.Extension]:
    """The kernels as libraries on torch's stable ABI, and the Python module beside them."""
    import torch
    from torch.utils import cpp_extension

    # ninja's own choice is more than the cores, and more than a small machine has memory for.
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

    headers = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
    given = os.environ.get("CFLAGS", "")
    # A sanitizer looks at the code as it is before it is improved, which takes most of the time.
    level = "-O1" if "-fsanitize" in given else "-O3"
    # Without errno and traps, which nobody asks for, more loops become vectors; no value changes.
    flags = [level, "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    if not any(flag.startswith("-g") for flag in given.split()):
        flags.append("-g0")  # Python's own flags ask for symbols, which fill most of a library
    oldest = "0x{:02x}{:02x}000000000000".format(*TORCH_OLDEST)
    stable = [*flags, f"-DTORCH_TARGET_VERSION={oldest}"]
    library = cpp_extension.CppExtension(
        "layerprune._cpu",
        [*sorted(map(str, Path("csrc/cpu").glob("*.cpp"))), *SHARED, "csrc/bindings/cpu.cpp"],
        depends=headers,
        extra_compile_args=stable,
        py_limited_api=True,  # it has no Python in it: one file for all versions
    )
    try:
        import pybind11

        include = [pybind11.get_include()]
    except ImportError:
        include = cpp_extension.include_paths()  # torch ships a copy
    facts = {
        "LAYERPRUNE_VERSION": VERSION,
        "LAYERPRUNE_TORCH_VERSION": torch.__version__,
        "LAYERPRUNE_TORCH_OLDEST": ".".join(map(str, TORCH_OLDEST)),
    }
    module = setuptools.Extension(
        "layerprune._C",
        ["csrc/bindings/python.cpp"],
        depends=headers,
        include_dirs=include,
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        extra_compile_args=flags,
        language="c++",
    )
    built = [library, module]
    if CUDA_OBSTACLE is None:
        built.append(cuda_library(stable, headers))  # the last: the others do without it
    for extension in built:
        extension.optional = CHOICE == "auto"
    return built


def record(folder: Path, reason: str | None, cuda_reason: str | None) -> None:
    """Leaves word for `layerprune info` of why there is no compiled part, and no earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    reasons = {"obstacle": reason, "cuda_obstacle": cuda_reason}
    (folder / "build.json").write_text(json.dumps(reasons) + "\n")
    unwanted = ["_C.*", "_cpu.*"] if reason is not None else []
    unwanted += ["_cuda.*"] if cuda_reason is not None else []
    for pattern in unwanted:
        for library in folder.glob(pattern):
            library.unlink()


OBSTACLE = obstacle()
CUDA_OBSTACLE = OBSTACLE or cuda_obstacle()
if OBSTACLE is not None:
    if CHOICE in ("cpu", "cuda"):
        raise SystemExit(f"LAYERPRUNE_BUILD={CHOICE}: {OBSTACLE}")
    print(f"layerprune: no compiled part, {OBSTACLE}")
elif CUDA_OBSTACLE is not None:
    if CHOICE == "cuda":
        raise SystemExit(f"LAYERPRUNE_BUILD=cuda: {CUDA_OBSTACLE}")
    print(f"layerprune: no CUDA kernels, {CUDA_OBSTACLE}")


class BuildPy(build_py):
    def run(self):
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        record(folder / "layerprune", OBSTACLE, CUDA_OBSTACLE)


COMMANDS = {"build_py": BuildPy}
if OBSTACLE is None:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self):
            folder = ROOT if self.inplace else Path(self.build_lib)
            files = {e.name: self.get_ext_filename(e.name) for e in self.extensions}
            built = {name: Path(self.build_lib, file) for name, file in files.items()}
            for path in built.values():
                path.unlink(missing_ok=True)
            # setuptools and ninja fail with one class of error each, and an optional extension is
            # passed over: what counts is whether the files are there.
            try:
                super().run()
            except Exception as error:
                if CHOICE != "auto":
                    raise
                print(f"layerprune: compiling failed: {error}")
            missing = {name for name, path in built.items() if not path.exists()}
            failed = "compiling failed in the build"
            if missing:
                ours = missing - {"layerprune._cuda"}
                record(folder / "layerprune", failed if ours else None, failed)

        def build_extension(self, extension):
            # The libraries have sources in common, compiled with other options in each.
            common, self.build_temp = self.build_temp, str(Path(self.build_temp, extension.name))
            super().build_extension(extension)
            self.build_temp = common

    COMMANDS["build_ext"] = BuildExt


setuptools.setup(
    packages=[
        *setuptools.find_packages(include=["layerprune", "layerprune.*"]),
        "layerprune.kernels",
    ],
    package_dir={"layerprune.kernels": "kernels"},
    ext_modules=extensions() if OBSTACLE is None else [],
    cmdclass=COMMANDS,
)
