"""The CUDA kernels compile, keep to their registers and move 16 bytes at a time; no GPU needed."""

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
# Of these every instance for aligned rows does so, in all dtypes.
ROW_KERNELS = ("forward_kernel", "backward_kernel", "scatter_add_kernel", "difference_kernel")
ALIGNED = "Lb1E"  # the last argument of a template, mangled

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def cuobjdump() -> str | None:
    """The program on the path, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    places = [Path(place) for place in (triton.submodule_search_locations if triton else ())]
    bundled = (place / "backends" / "nvidia" / "bin" / "cuobjdump" for place in places)
    found = shutil.which("cuobjdump") or next((str(p) for p in bundled if p.exists()), None)
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    """For every source and architecture the device code and what the assembler reported."""
    folder = tmp_path_factory.mktemp("cubins")

    def build(job: tuple[Path, str]) -> tuple[tuple[str, str], tuple[Path, str]]:
        source, architecture = job
        target = folder / f"{source.stem}_{architecture}.cubin"
        options = ["-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
        command = ["nvcc", *options, "-Werror=all-warnings", "-o", str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (source.stem, architecture), (target, done.stderr)

    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, jobs))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_kernels_keep_to_their_registers(compiled, source: str, architecture: str) -> None:
    """No stack frame, which arrays with unknown indices would make, and no spills."""
    report = compiled[source, architecture][1]
    entries = re.findall(r"Compiling entry function '(\w+)'", report)
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    assert entries and len(used) >= len(entries)
    assert set(used) == {("0", "0", "0")}, report


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["forward", "backward", "gather"])
def test_rows_move_16_bytes_at_a_time(compiled, source: str, architecture: str) -> None:
    program = cuobjdump()
    if program is None:
        pytest.skip("needs cuobjdump")
    command = [program, "-sass", str(compiled[source, architecture][0])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
    chosen = [
        name
        for name in functions
        if (any(kernel in name for kernel in ROW_KERNELS) and ALIGNED in name)
        # Gathering moves words of any width: the widest must.
        or ("gather_kernel" in name and "uint4" in name)
    ]
    assert len(chosen) == {"forward": 12, "backward": 12, "gather": 9}[source]
    for name in chosen:
        assert re.search(r"LDG\.E\.(\w+\.)*128", functions[name]), f"{name} loads no 16 bytes"
        assert re.search(r"STG\.E\.(\w+\.)*128", functions[name]), f"{name} stores no 16 bytes"
