"""What pyproject.toml cannot say: where `layerprune.kernels` comes from, and the compiled part.

LAYERPRUNE_BUILD says what is compiled:
  auto  (default) the CPU kernels where torch and a C++ compiler are there; nothing, otherwise: the
        package then installs all the same, and `layerprune info` says what is missing
  cpu   the CPU kernels, or the build fails
  none  nothing
MAX_JOBS bounds how many files are compiled at a time; CXX and CFLAGS are honoured.
"""

import json
import os
import re
import shlex
import shutil
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
CHOICES = ("auto", "cpu", "cuda", "none")
CHOICE = os.environ.get("LAYERPRUNE_BUILD") or "auto"
if not os.environ.get("CXX", "c++").strip():
    del os.environ["CXX"]  # empty is unset


def obstacle() -> str | None:
    """Why nothing can be compiled here, or None."""
    if CHOICE not in CHOICES:
        raise SystemExit(f"LAYERPRUNE_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}")
    if CHOICE == "cuda":
        raise SystemExit(
            "LAYERPRUNE_BUILD=cuda: this version has no CUDA kernels yet. Use auto or cpu; the"
            " eager reference serves CUDA tensors"
        )
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


def extensions() -> list[setuptools.Extension]:
    """The CPU kernels as a library on torch's stable ABI, and the Python module beside it."""
    import torch
    from torch.utils import cpp_extension

    # ninja's own choice is more than the cores, and more than a small machine has memory for.
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

    headers = sorted(map(str, Path("csrc").rglob("*.h")))
    # Without errno and traps, which nobody asks for, more loops become vectors; no value changes.
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    if "-g" not in os.environ.get("CFLAGS", "").split():
        flags.append("-g0")  # Python's own flags ask for symbols, which fill most of a library
    oldest = "0x{:02x}{:02x}000000000000".format(*TORCH_OLDEST)
    library = cpp_extension.CppExtension(
        "layerprune._cpu",
        [
            *sorted(map(str, Path("csrc/cpu").glob("*.cpp"))),
            *(f"csrc/bindings/{n}.cpp" for n in ("gates", "gather", "indices", "residual", "rows")),
        ],
        depends=headers,
        extra_compile_args=[*flags, f"-DTORCH_TARGET_VERSION={oldest}"],
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
    for extension in (library, module):
        extension.optional = CHOICE == "auto"
    return [library, module]


def record(folder: Path, reason: str | None) -> None:
    """Leaves word for `layerprune info` of why there is no compiled part, and no earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.json").write_text(json.dumps({"obstacle": reason}) + "\n")
    if reason is not None:
        for library in (*folder.glob("_C.*"), *folder.glob("_cpu.*")):
            library.unlink()


OBSTACLE = obstacle()
if OBSTACLE is not None:
    if CHOICE == "cpu":
        raise SystemExit(f"LAYERPRUNE_BUILD=cpu: {OBSTACLE}")
    print(f"layerprune: no compiled part, {OBSTACLE}")


class BuildPy(build_py):
    def run(self):
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        record(folder / "layerprune", OBSTACLE)


COMMANDS = {"build_py": BuildPy}
if OBSTACLE is None:
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self):
            folder = ROOT if self.inplace else Path(self.build_lib)
            built = [Path(self.build_lib, self.get_ext_filename(e.name)) for e in self.extensions]
            for path in built:
                path.unlink(missing_ok=True)
            # setuptools and ninja fail with one class of error each, and an optional extension is
            # passed over: what counts is whether the files are there.
            try:
                super().run()
            except Exception as error:
                if CHOICE != "auto":
                    raise
                print(f"layerprune: compiling failed: {error}")
            if not all(path.exists() for path in built):
                record(folder / "layerprune", "compiling failed in the build")

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
