"""The Triton kernels compile for devices: the interpreter lets pass what the compiler does not."""

import importlib.util
import os
import re
import subprocess

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or not (
    importlib.util.find_spec("triton") and importlib.util.find_spec("layerprune.kernels")
):
    pytest.skip("needs Triton's compiler and layerprune installed", allow_module_level=True)

from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layerprune.kernels import draw, residual, rows, step

FLAGS = {"RELU": False, "LERP": False, "SAMPLED": False, "SLOTTED": True}
FORMS = [
    {},
    {"SLOTTED": False},
    {"RELU": True},
    {"RELU": True, "MASKED": True},
    {"LERP": True},
    {"SAMPLED": True, "SLOTTED": False},
]
INTEGERS = ("size", "size_class", "count", "sections", "batch", "min_rows", "row_multiple")
SIZES = dict.fromkeys((*INTEGERS, *rows.COUNTS, "max_descending"), "i32")
SIZES |= dict.fromkeys(("horizon", "noise_factor", "decay", "confidence"), "fp32")
INDICES = {
    "slot": "*i32", "owner": "*i64", "factor_row": "*i64", "x_row": "*i64", "index": "*i32",
    "rng_state": "*i64", "mask": "*u8", "gate": "*fp32", "gates_out": "*fp32", "theta": "*fp32",
    "parts": "*fp32", "slots": "*i32", "probes": "*i64", "counts": "*i64", "gates": "*fp32",
    "probe_rate": "*fp32", "statistics": "*fp32", "in_play": "*i1", "slope": "*fp32",
    "counted": "*i1", "penalty": "*fp32", "free": "*i1", "moved": "*fp32", "finished": "*i32",
}  # fmt: skip


CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90)
WIDE = re.compile(r"LDG\.E\.(\w+\.)*128")


def machine_code(binary, folder):
    """The disassembled kernel, which must not spill."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary)

    command = [str(CUOBJDUMP), "-sass", str(file)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(STL|LDL)\b", code)
    return code


def compiled(kernel, element, constants, architecture, warps=4, **types):
    """A kernel's code in all its stages."""
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("stride"):
            signature[name] = "i32"
        else:
            signature[name] = SIZES.get(name) or INDICES.get(name) or f"*{element}"
    # Addresses and sizes that are multiples of 16, as for tensors of the usual shapes.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name.endswith(("stride", "size"))
    }
    source = ASTSource(function, signature, constants, aligned)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("element", ["fp64", "fp32", "bf16"])  # fp16 is as bf16
@pytest.mark.parametrize("form", FORMS)
def test_residual(form, element, architecture, tmp_path):
    """Every form, with 16-byte accesses."""
    flags = FLAGS | form
    masked = flags.pop("MASKED", False)
    if not masked:
        flags["mask"] = None
    flags |= dict.fromkeys(("gate",) if flags["SAMPLED"] else ("theta", "rng_state"), None)
    if not flags["SLOTTED"]:
        flags["slot"] = None
    forward = flags | ({} if flags["SAMPLED"] else {"gates_out": None})
    # Of the tuner's choice all for the newer architecture, one for the older.
    for config in rows.CONFIGS[: None if architecture == ARCHITECTURES[-1] else 1]:
        constants = forward | config.kwargs
        warps = config.num_warps
        code = compiled(residual._forward_kernel, element, constants, architecture, warps)
        assert WIDE.search(machine_code(code["cubin"], tmp_path))
    graded = not flags["SAMPLED"]
    backward = flags | {"GRADED": graded, "BLOCK": rows.SEGMENT}
    missing = [] if flags["RELU"] and not masked else ["y"]
    missing += [] if graded else ["factor", "parts", "factor_row"]
    missing += [] if flags["SLOTTED"] else ["owner"]
    wide = "fp64" if element == "fp64" else "fp32"
    types = {"parts": f"*{wide}"} | ({"factor": f"*{wide}"} if flags["LERP"] else {})
    constants = backward | dict.fromkeys(missing, None)
    types = {name: kind for name, kind in types.items() if name not in constants}
    code = compiled(residual._backward_kernel, element, constants, architecture, 8, **types)
    assert WIDE.search(machine_code(code["cubin"], tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("element", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("asked", [False, True])
def test_rows(element, asked, architecture, tmp_path):
    """The gather, its gradient, and what backward keeps of the branch."""
    index, block = {"rows": "*i64"}, {"BLOCK": rows.SEGMENT}
    found = [
        compiled(kernel, element, block, architecture, **index)
        for kernel in (rows._gather_kernel, rows._scatter_add_kernel)
    ]
    wide = "fp64" if element == "fp64" else "fp32"
    for lerp in (False, True):
        constants = {"LERP": lerp, "ASKED": asked, "SLOTTED": True} | block
        types = {"out": f"*{wide}"} if lerp else {}
        found.append(compiled(rows._factor_kernel, element, constants, architecture, **types))
    for code in found:
        assert WIDE.search(machine_code(code["cubin"], tmp_path))
    index = {"index": "*i64" if asked else "*i32", "out": "*i64"}
    code = compiled(rows._inverse_kernel, element, {"BLOCK": 1024}, architecture, **index)
    machine_code(code["cubin"], tmp_path)


@pytest.mark.parametrize("systematic", [False, True])
def test_draw(systematic):
    lists = {"rows": "*i64", "section": "i32"}
    constants = {"SYSTEMATIC": systematic, "BLOCK": 256, "CHUNK": 16}
    assembly = compiled(draw._draw_kernel, "fp32", constants, 80, **lists)["ptx"]
    # Else a probe's gate would differ in its last bit.
    assert "div.rn.f32" in assembly or not systematic


@pytest.mark.parametrize("compete", [False, True])
def test_step(compete):
    constants = {"COMPETE": compete, "TOGETHER": 4, "BLOCK_ROWS": 256, "BLOCK": 1024, "CHUNK": 16}
    compiled(step._step_kernel, "fp32", constants, 80)
