"""What is built from the tree holds what it should, and the core imports without the extras."""

import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import layerprune

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "matplotlib safetensors sklearn tensorboard torchvision tqdm typer yaml".split()


def python(*arguments: str, cwd: Path) -> str:
    """Runs Python in ``cwd`` with nothing but the installed packages and ``cwd`` on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, tree: Path, output: Path) -> Path:
    """Builds a ``wheel`` or an ``sdist`` of ``tree`` and returns the file."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    output.mkdir()
    python("-c", code, cwd=tree)
    (built,) = output.iterdir()
    return built


def site_tree(folder: Path, prefix: str) -> set[str]:
    """Paths of a folder's files below ``prefix``, without those that tools leave behind."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (
        path
        for path in files
        if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    )
    return {str(Path(prefix) / path) for path in kept}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    tmp = tmp_path_factory.mktemp("wheel")
    tree = tmp / "tree"  # a copy: a build leaves its own folders behind
    tree.mkdir()
    for name in ["pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, tree)
    for name in ["layerprune", "kernels", "csrc"]:
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    return build("wheel", tree, tmp / "dist")


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip would put it into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_holds_the_tree_and_nothing_else(site: Path) -> None:
    tree = site_tree(ROOT / "layerprune", "layerprune")
    kernels = site_tree(ROOT / "kernels", "layerprune/kernels")
    assert {name for name in site_tree(site, "") if ".dist-info/" not in name} == tree | kernels


def test_kernels_install_inside_the_package(site: Path) -> None:
    where = python("-c", "import layerprune.kernels as k; print(k.__file__)", cwd=site)
    assert Path(where.strip()) == site / "layerprune" / "kernels" / "__init__.py"


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        licence = archive.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert metadata["Version"] == layerprune.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(needed) == ["numpy", "torch>=2.10"]
    assert sorted(metadata.get_all("Provides-Extra")) == ["dev", "train"]


def test_command_is_there(site: Path) -> None:
    pytest.importorskip("typer")
    (found,) = importlib.metadata.distributions(path=[str(site)])
    (entry,) = found.entry_points.select(group="console_scripts")
    assert (entry.name, entry.value) == ("layerprune", "layerprune.cli:main")
    assert callable(entry.load())


def test_wheel_from_the_sdist_is_the_same(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", wheel.parent.parent / "tree", tmp_path / "sdist")
    python("-m", "tarfile", "-e", str(sdist), "unpacked", cwd=tmp_path)
    (tree,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", tree, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_core_imports_without_the_extras() -> None:
    code = f"""
import sys
missing = {TRAIN}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import layerprune, layerprune.models
"""
    python("-c", code, cwd=ROOT)
