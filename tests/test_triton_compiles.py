"""The Triton kernels compile for a device: the interpreter lets pass what the compiler does not."""

import importlib.util
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" or not (
    importlib.util.find_spec("triton") and importlib.util.find_spec("layerprune.kernels")
):
    pytest.skip("needs Triton's compiler and layerprune installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from layerprune.kernels import draw, residual, rows, step

FLAGS = {"RELU": False, "LERP": False, "SAMPLED": False, "SLOTTED": True}
FORMS = [
    {},
    {"SLOTTED": False},
    {"RELU": True},
    {"LERP": True},
    {"SAMPLED": True, "SLOTTED": False},
]
SIZES = {"size": "i64", "size_class": "i32", "rows": "i64", "branch_rows": "i64", "x_rows": "i64"}
SIZES |= {"out_rows": "i64", "factor_rows": "i64", "count": "i64", "sections": "i32"}
SIZES |= {"section": "i64", "batch": "i32", "min_rows": "i32", "row_multiple": "i32"}
SIZES |= dict.fromkeys(("horizon", "noise_factor", "decay", "confidence"), "fp32")
SIZES["max_descending"] = "i32"
INDICES = {
    "slot": "*i32", "owner": "*i64", "factor_row": "*i64", "x_row": "*i64", "index": "*i32",
    "rng_state": "*i64", "gate": "*fp32", "gates_out": "*fp32", "theta": "*fp32",
    "parts": "*fp32", "slots": "*i32", "probes": "*i64", "counts": "*i64", "gates": "*fp32",
    "probe_rate": "*fp32", "statistics": "*fp32", "in_play": "*i1", "slope": "*fp32",
    "counted": "*i1", "penalty": "*fp32", "free": "*i1", "moved": "*fp32", "finished": "*i32",
}  # fmt: skip


def compiled(kernel, element, constants, **types):
    """A kernel's assembly for sm_80, and with it the registers that ptxas gave it."""
    function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
    signature = {}
    for name in function.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("stride"):
            signature[name] = "i64"
        else:
            signature[name] = SIZES.get(name) or INDICES.get(name) or f"*{element}"
    # Addresses and sizes that are multiples of 16, as for tensors of the usual shapes.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name.endswith(("stride", "size"))
    }
    source = ASTSource(function, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm


@pytest.mark.parametrize("element", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_residual(form, element):
    """Every form, with 16-byte accesses."""
    flags = FLAGS | form
    flags |= dict.fromkeys(("gate",) if flags["SAMPLED"] else ("theta", "rng_state"), None)
    if not flags["SLOTTED"]:
        flags["slot"] = None
    forward = flags | ({} if flags["SAMPLED"] else {"gates_out": None}) | {"BLOCK": 2048}
    assembly = compiled(residual._forward_kernel, element, forward)["ptx"]
    assert "ld.global.v4.b32" in assembly or "ld.global.v2.b64" in assembly
    graded = not flags["SAMPLED"]
    backward = flags | {"GRADED": graded, "BLOCK": rows.SEGMENT}
    missing = [] if flags["RELU"] else ["y"]
    missing += [] if graded else ["factor", "parts", "factor_row"]
    missing += [] if flags["SLOTTED"] else ["owner"]
    wide = "fp64" if element == "fp64" else "fp32"
    types = {"parts": f"*{wide}"} | ({"factor": f"*{wide}"} if flags["LERP"] else {})
    constants = backward | dict.fromkeys(missing, None)
    types = {name: kind for name, kind in types.items() if name not in constants}
    assembly = compiled(residual._backward_kernel, element, constants, **types)["ptx"]
    assert "ld.global.v4.b32" in assembly or "ld.global.v2.b64" in assembly


@pytest.mark.parametrize("element", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("asked", [False, True])
def test_rows(element, asked):
    """The gather, its gradient, and what backward keeps of the branch."""
    index, block = {"rows": "*i64"}, {"BLOCK": rows.SEGMENT}
    compiled(rows._gather_kernel, element, block, **index)
    compiled(rows._scatter_add_kernel, element, block, **index)
    wide = "fp64" if element == "fp64" else "fp32"
    for lerp in (False, True):
        constants = {"LERP": lerp, "ASKED": asked, "SLOTTED": True} | block
        compiled(rows._factor_kernel, element, constants, **({"out": f"*{wide}"} if lerp else {}))
    index = {"index": "*i64" if asked else "*i32", "out": "*i64", "size": "i64"}
    compiled(rows._inverse_kernel, element, {"BLOCK": 1024}, **index)


@pytest.mark.parametrize("systematic", [False, True])
def test_draw(systematic):
    lists = {"rows": "*i64", "section": "i32"}
    constants = {"SYSTEMATIC": systematic, "BLOCK": 256, "CHUNK": 16}
    assembly = compiled(draw._draw_kernel, "fp32", constants, **lists)["ptx"]
    # Else a probe's gate would differ in its last bit.
    assert "div.rn.f32" in assembly or not systematic


@pytest.mark.parametrize("compete", [False, True])
def test_step(compete):
    constants = {"COMPETE": compete, "TOGETHER": 4, "BLOCK_ROWS": 256, "BLOCK": 1024, "CHUNK": 16}
    compiled(step._step_kernel, "fp32", constants, count="i32")
