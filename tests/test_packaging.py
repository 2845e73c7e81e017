"""What is built from the tree installs and works: compiled, without a compiler, without torch."""

import email
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import layerprune

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "matplotlib safetensors sklearn tensorboard torchvision tqdm typer yaml".split()
COMPILED = {
    "layerprune/_C" + importlib.machinery.EXTENSION_SUFFIXES[0],
    "layerprune/_cpu.abi3.so",
    "layerprune/build.json",
}
CUDA = "layerprune/_cuda.abi3.so"
BUILDS_CUDA = shutil.which("nvcc") is not None and torch.version.cuda is not None
BUILD_WHEEL = "from setuptools import build_meta; build_meta.build_wheel({!r})"
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
WITHOUT_NINJA = "import os; os.environ['PATH'] = '/usr/bin:/bin'; "  # torch runs the command


def run(*command: str | Path, cwd: Path, fails: bool = False, **environment: str) -> str:
    """Runs a command in ``cwd`` without this process's paths and wishes; returns its output.

    CUDA is compiled for one architecture: for all of them it was when layerprune was installed.
    """
    ours = ("PYTHONPATH", "LAYERPRUNE_BACKEND", "LAYERPRUNE_BUILD", "ATEN_CPU_CAPABILITY")
    clean = {key: value for key, value in os.environ.items() if key not in ours}
    clean["TORCH_CUDA_ARCH_LIST"] = "9.0"
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def python(*arguments: str, cwd: Path, **options: object) -> str:
    """Runs this Python in ``cwd``, which is on its path."""
    return run(sys.executable, *arguments, cwd=cwd, **options)


def files(folder: Path, prefix: str = "") -> set[str]:
    """Paths of a folder's files below ``prefix``, without those that tools leave behind."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        str(Path(prefix, path))
        for path in found
        if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    }


def sources() -> set[str]:
    """The files of the package in the tree, as they are installed."""
    package = files(ROOT / "layerprune", "layerprune") | files(
        ROOT / "kernels", "layerprune/kernels"
    )
    return {name for name in package if not name.endswith(".so")} - COMPILED


def unpacked(folder: Path, into: Path) -> Path:
    """The content of the only wheel in ``folder``, as pip would put it into site-packages."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: a build leaves its own folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path_factory.mktemp("sources") / "tree"
    tree.mkdir()
    for name in ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tree)
    for name in ["layerprune", "kernels", "csrc"]:
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.so", "build.json")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    return tree


@pytest.fixture(scope="module")
def wheels(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled wheel, as `pip install --no-build-isolation .` builds it."""
    folder = tmp_path_factory.mktemp("wheels")
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir"]
    python("-m", "pip", "wheel", *options, str(folder), ".", cwd=tree)
    return folder


@pytest.fixture(scope="module")
def site(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(wheels, tmp_path_factory.mktemp("site"))


CHECK = """
import torch, layerprune
from layerprune import ops
y, gates = ops.sampled_gated_residual(
    torch.ones(8, 3), torch.ones(8, 3), torch.tensor(0.5), torch.tensor([1, 2, 3]), 0)
assert torch.equal(y, 1 + gates[:, None].expand(8, 3)) and 0 < gates.sum() < 8
print(layerprune.__file__)
print(layerprune.backends()["cpu"])
"""


@pytest.mark.slow
def test_wheel_holds_the_package_and_the_compiled_part(site: Path) -> None:
    compiled = COMPILED | ({CUDA} if BUILDS_CUDA else set())
    assert {n for n in files(site) if ".dist-info/" not in n} == sources() | compiled
    where = python("-c", "import layerprune.kernels as k; print(k.__file__)", cwd=site)
    assert Path(where.strip()) == site / "layerprune" / "kernels" / "__init__.py"


@pytest.mark.slow
def test_wheel_works(site: Path) -> None:
    where, backend = python("-c", CHECK, cwd=site).splitlines()
    assert Path(where) == site / "layerprune" / "__init__.py"
    assert backend.startswith("compiled: ") and f"built with torch {torch.__version__}" in backend
    info = python("-m", "layerprune", "info", cwd=site)
    assert backend in info


@pytest.mark.slow
def test_metadata(wheels: Path, site: Path) -> None:
    (wheel,) = wheels.glob("*.whl")
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{tag}-{tag}-" in wheel.name
    (folder,) = site.glob("*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text())
    licence = (folder / "licenses" / "LICENSE").read_text()
    assert metadata["Version"] == layerprune.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(needed) == ["numpy", "torch>=2.10"]
    assert sorted(metadata.get_all("Provides-Extra")) == ["dev", "export", "train"]


@pytest.mark.slow
def test_command_is_there(site: Path) -> None:
    pytest.importorskip("typer")
    (found,) = importlib.metadata.distributions(path=[str(site)])
    (entry,) = found.entry_points.select(group="console_scripts")
    assert (entry.name, entry.value) == ("layerprune", "layerprune.cli:main")
    assert callable(entry.load())


@pytest.mark.slow
def test_wheel_from_the_sdist_is_the_same(site: Path, tree: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    python("-c", code, cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    python("-m", "tarfile", "-e", str(sdist), "unpacked", cwd=tmp_path)
    (again,) = (tmp_path / "unpacked").iterdir()
    python("-c", BUILD_WHEEL.format(str(tmp_path)), cwd=again)
    assert files(unpacked(tmp_path, tmp_path / "site")) == files(site)


@pytest.mark.slow
def test_editable_install_works(tree: Path, tmp_path: Path) -> None:
    """In an environment of its own that sees the packages of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    interpreter = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ignored = shutil.ignore_patterns("build", "*.egg-info")
    tree = shutil.copytree(tree, tmp_path / "a tree", ignore=ignored)
    options = ["--no-build-isolation", "--no-deps", "-e", str(tree)]
    install = ["-m", "pip", "--python", str(interpreter), "install", *options]
    python(*install, cwd=tmp_path)
    where, backend = run(interpreter, "-c", CHECK, cwd=tmp_path).splitlines()
    assert Path(where) == tree / "layerprune" / "__init__.py"
    assert backend.startswith("compiled: ")
    # A later build that fails leaves nothing of the earlier one, and the command that mends it.
    python(*install, cwd=tmp_path, CXX="false")
    assert not [*(tree / "layerprune").glob("*.so")]
    backend = run(interpreter, "-c", CHECK, cwd=tmp_path).splitlines()[1]
    assert "compiling failed in the build" in backend
    command = backend.partition("To mend it: ")[2]
    assert command.endswith(f"--force-reinstall -e {shlex.quote(str(tree))}")


@pytest.mark.parametrize(
    ("before", "environment", "reason"),
    [
        ("", {"CXX": "/absent/c++"}, "the build found no C++ compiler (/absent/c++)"),
        (
            WITHOUT.format(["torch"]),
            {},
            "the build had no torch to compile against, as in an isolated build",
        ),
        ("import torch; torch.__version__ = '2.9.1'; ", {}, "torch 2.9.1, older than 2.10"),
        ("", {"LAYERPRUNE_BUILD": "none"}, "LAYERPRUNE_BUILD=none left the compiled part out"),
        ("", {"CXX": "false"}, "compiling failed in the build"),
        (WITHOUT_NINJA, {"CXX": "false", "CC": "false"}, "compiling failed in the build"),
    ],
    ids=["no compiler", "no torch", "old torch", "none", "compiler fails", "fails without ninja"],
)
def test_installs_without_the_compiled_part(
    tree: Path, tmp_path: Path, before: str, environment: dict[str, str], reason: str
) -> None:
    """The package works, says what was missing, and the one command that mends it."""
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build"))
    python("-c", before + BUILD_WHEEL.format(str(tmp_path)), cwd=copy, **environment)
    site = unpacked(tmp_path, tmp_path / "site")
    installed = {name for name in files(site) if ".dist-info/" not in name}
    assert installed == sources() | {"layerprune/build.json"}
    backend = python("-c", CHECK, cwd=site).splitlines()[1]
    assert backend.startswith("eager: the compiled part is not in use, ") and reason in backend
    pip = f"{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall"
    assert backend.endswith(f"To mend it: LAYERPRUNE_BUILD=cpu {pip} path/to/layerprune")
    assert backend in python("-m", "layerprune", "info", cwd=site)
    refusal = python("-c", CHECK, cwd=site, fails=True, LAYERPRUNE_BACKEND="compiled")
    assert f"ImportError: LAYERPRUNE_BACKEND=compiled: layerprune runs {backend}" in refusal


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LAYERPRUNE_BUILD": "cpu", "CXX": "/absent/c++"}, "found no C++ compiler (/absent/c++)"),
        ({"LAYERPRUNE_BUILD": "cpu", "CXX": "false"}, "Error"),
        (
            {"LAYERPRUNE_BUILD": "cuda", "CUDA_HOME": "/absent"},
            "LAYERPRUNE_BUILD=cuda: the build found no nvcc with CUDA's headers",
        ),
        ({"LAYERPRUNE_BUILD": "cuda", "CXX": "/absent/c++"}, "found no C++ compiler (/absent/c++)"),
        ({"LAYERPRUNE_BUILD": "gpu"}, "must be one of auto, cpu, cuda, none, got 'gpu'"),
    ],
)
def test_a_build_that_was_asked_for_fails_with_the_reason(
    tree: Path, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    build = BUILD_WHEEL.format(str(tmp_path))
    assert message in python("-c", build, cwd=tree, fails=True, **environment)


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS_CUDA, reason="needs nvcc and a torch with CUDA")
def test_without_cuda_in_the_build_the_rest_is_there(tree: Path, tmp_path: Path) -> None:
    """Nothing but the reason is missing, and a failing compiler for CUDA spoils nothing else."""
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build"))
    for number, environment in enumerate(({"LAYERPRUNE_BUILD": "cpu"}, {"NVCC_APPEND_FLAGS": "?"})):
        wheels = tmp_path / str(number)
        python("-c", BUILD_WHEEL.format(str(wheels)), cwd=copy, **environment)
        site = unpacked(wheels, tmp_path / f"site{number}")
        assert {n for n in files(site) if ".dist-info/" not in n} == sources() | COMPILED
        reasons = json.loads((site / "layerprune" / "build.json").read_text())
        assert reasons["obstacle"] is None and reasons["cuda_obstacle"] is not None
        for built in (copy / "build").glob("lib*"):  # objects that are alike are compiled once
            shutil.rmtree(built)


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS_CUDA, reason="needs nvcc and a torch with CUDA")
def test_the_cuda_library_registers_its_kernels(site: Path) -> None:
    """Without a GPU it is not loaded by itself, but it can be. ReLU's mask is its own."""
    output = python("-c", REGISTERED, cwd=site)
    assert output.splitlines() == ["gated_relu gated_relu_backward"]


REGISTERED = """
import torch, layerprune
torch.ops.load_library("layerprune/_cuda.abi3.so")
def registered(key):
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("layerprune::") for name in names if name.startswith("layerprune::")}
print(*sorted(registered("CUDA") ^ registered("CPU")))
"""

MISFITS = {
    "torch": (
        lambda package: None,
        "import torch; torch.__version__ = '2.9.1'",
        f"built with torch {torch.__version__} for torch 2.10 and newer, this is torch 2.9.1",
    ),
    "python": (
        lambda package: next(package.glob("_C.*")).rename(package / "_C.cpython-38-any.so"),
        "",
        f"it was built for Python cpython-38-any, this is {sysconfig.get_config_var('SOABI')}",
    ),
    "version": (
        lambda package: (package / "_version.py").write_text('__version__ = "9.9"\n'),
        "",
        f"it was built for layerprune {layerprune.__version__}, this is 9.9",
    ),
    "library": (
        lambda package: (package / "_cpu.abi3.so").write_bytes(b"no library"),
        "",
        f"for torch 2.10 and newer, and does not load into torch {torch.__version__}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_names_both_versions(site: Path, tmp_path: Path, misfit: str) -> None:
    """A warning and the eager reference; an error where the compiled part is demanded."""
    damage, before, message = MISFITS[misfit]
    copy = shutil.copytree(site, tmp_path / "site")
    damage(copy / "layerprune")
    output = python("-c", before + CHECK, cwd=copy)
    assert "RuntimeWarning: layerprune runs eager" in output and message in output
    refusal = python("-c", before + CHECK, cwd=copy, fails=True, LAYERPRUNE_BACKEND="compiled")
    assert "ImportError" in refusal and message in refusal and "undefined symbol" not in refusal


def test_an_unknown_backend_is_refused() -> None:
    output = python("-c", CHECK, cwd=ROOT, fails=True, LAYERPRUNE_BACKEND="fast")
    assert "LAYERPRUNE_BACKEND must be auto, eager, compiled or triton, got 'fast'" in output


GPU = "import torch; torch.cuda.is_available = lambda: True\n"  # enough to choose for one
CHOICE = """
import layerprune, torch
print(layerprune.backends()["cuda"])
print(torch._C._dispatch_has_kernel_for_dispatch_key("layerprune::gated_residual", "CUDA"))
"""
INSTALLED = pytest.mark.skipif(
    not importlib.util.find_spec("layerprune.kernels") or not importlib.util.find_spec("triton"),
    reason="needs Triton and layerprune installed",
)


@INSTALLED
def test_triton_serves_cuda_where_it_is_wished_for() -> None:
    """Also beside the compiled part; the CPU's backend is as without the wish."""
    code = GPU + CHOICE + "print(layerprune.backends()['cpu'])"
    output = python("-c", code, cwd=ROOT, LAYERPRUNE_BACKEND="triton").splitlines()
    version = importlib.metadata.version("triton")
    assert output[0] == f"triton: kernels by Triton {version}; LAYERPRUNE_BACKEND=triton"
    assert output[1] == "True"
    code = "import layerprune; print(layerprune.backends()['cpu'])"
    assert output[2] == python("-c", code, cwd=ROOT).strip()
    without = python("-c", CHOICE, cwd=ROOT, LAYERPRUNE_BACKEND="triton").splitlines()
    assert without == ["eager: there is no GPU that torch can use", "False"]


MISSING = {
    "Triton's kernels are missing in a source tree that is not installed": (
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: 'kernels' not in name and found(name, *rest) or None\n",
        f"--no-build-isolation --no-deps --force-reinstall -e {shlex.quote(str(ROOT))}",
    ),
    "Triton is not installed": (
        "import importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n",
        f"{shlex.quote(sys.executable)} -m pip install triton",
    ),
}


@INSTALLED
@pytest.mark.parametrize("reason", MISSING)
def test_a_wish_for_triton_names_what_is_missing(reason: str) -> None:
    """And the command that brings it."""
    before, remedy = MISSING[reason]
    output = python("-c", before + CHOICE, cwd=ROOT, fails=True, LAYERPRUNE_BACKEND="triton")
    assert f"ImportError: LAYERPRUNE_BACKEND=triton: {reason}. To mend it: " in output
    assert output.rstrip().endswith(remedy)


def test_core_imports_without_the_extras() -> None:
    python("-c", WITHOUT.format(TRAIN) + "import layerprune, layerprune.models", cwd=ROOT)
