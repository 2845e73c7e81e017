"""Export: what is written computes what the module computes, and needs nothing of layerprune."""

import importlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import layerprune
from layerprune import GatedResidual, LayerPruner
from layerprune.cli import main
from layerprune.models import build
from layerprune.training import checkpoint
from layerprune.training.export import ExportError, export

SIZE = 32
BLOCKS = [f"layer{stage}.{index}" for stage in range(1, 5) for index in range(2)]


def images(rows, channels=3, size=SIZE):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, channels, size, size, generator=generator)


def shifted(model):
    """BatchNorm statistics that are not those of a fresh model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def compacted():
    """A ResNet-18 that lost a whole stage, a downsampling block's branch, and more."""
    torch.manual_seed(3)
    model = shifted(resnet18(num_classes=7))
    gone = {"layer1.0", "layer1.1", "layer2.0", *random.Random(3).sample(BLOCKS, 2)}
    pruner = LayerPruner(model, example_inputs=images(2), total_steps=10, strength=0.1)
    model(images(4)).sum().backward()
    for index, section in enumerate(pruner.sections):
        pruner._run.bank.theta[index] = float(section.name not in gone)
    return pruner.strip(renumber=True)


def test_a_stripped_model_is_like_one_that_was_never_pruned(compacted):
    """Classes, attributes and hooks are those that torch and torchvision give a fresh module."""
    fresh = [(type(module), set(vars(module))) for module in resnet18().modules()]
    for module in compacted.modules():
        assert type(module).__module__.startswith(("torch.nn.", "torchvision."))
        assert (type(module), set(vars(module))) in fresh
        hooks = [value for name, value in vars(module).items() if "hook" in name]
        assert hooks and not any(hooks)
    assert all(p.is_leaf and not p._backward_hooks for p in compacted.parameters())


WITHOUT_LAYERPRUNE = """
import sys
sys.modules["layerprune"] = None
import torch
inputs, expected = torch.load("cases.pt")
program = torch.export.load("model.pt2").module()
assert "torchvision" not in sys.modules
module = torch.load("module.pt", weights_only=False)
with torch.no_grad():
    for x, y in zip(inputs, expected):
        assert program(x).equal(y) and module(x).equal(y), float((program(x) - y).abs().max())
"""


@pytest.mark.slow
def test_programs_and_pickles_need_no_layerprune(compacted, tmp_path):
    compacted.train()
    assert layerprune.export(compacted, images(2), tmp_path / "model.pt2", "torch") == 0.0
    assert all(module.training for module in compacted.modules())
    compacted.eval()
    inputs = [images(rows) for rows in (1, 2, 5)]
    with torch.no_grad():
        torch.save((inputs, [compacted(x) for x in inputs]), tmp_path / "cases.pt")
    torch.save(compacted, tmp_path / "module.pt")
    command = [sys.executable, "-c", WITHOUT_LAYERPRUNE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def onnx_outputs(path, **tensors):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_a_compacted_resnet(compacted, tmp_path):
    import onnx

    path = tmp_path / "model.onnx"
    difference = export(compacted.eval(), images(2), path, "onnx")
    assert 0.0 <= difference < 1e-4
    for rows in (1, 2, 5):
        expected = compacted(images(rows)).numpy()
        (found,) = onnx_outputs(path, x=images(rows))
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    shapes = [tuple(d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim)]
    assert shapes == [("batch", 3, SIZE, SIZE)]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with a section that is gone, and an undecided one that evaluation leaves out."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint-5"
    kwargs = {"num_classes": 4, "in_channels": 1, "image_size": 8, "width": 4}
    torch.manual_seed(0)
    model = shifted(build("resnet20", **kwargs))
    layerprune.eliminate_sections(model, ["block1_2"], images(2, 1, 8))
    sections = [
        {
            "name": "block1_2",
            "kind": "residual",
            "theta": 0.0,
            "status": "eliminated",
            "several_arguments": False,
        },
        {
            "name": "block2_1",
            "kind": "residual",
            "theta": 0.25,
            "status": "open",
            "several_arguments": False,
        },
    ]
    builder = {"name": "resnet20", "kwargs": kwargs}
    structure = checkpoint.structure_of(builder, None, images(2, 1, 8), ["block1_2"], sections)
    checkpoint.save(folder, model.state_dict(), structure, {"step": 5})
    layerprune.eliminate_sections(model, ["block2_1"], images(2, 1, 8))
    return folder, model.eval()


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["export", *map(str, arguments)])
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.mark.slow
@torch.no_grad()
def test_checkpoints_are_exported_from_the_command_line(run, saved, tmp_path):
    folder, model = saved
    x = images(3, 1, 8)
    output = tmp_path / "new" / "plain"
    code, out, err = run(folder, "--format", "safetensors", "--output", output)
    assert (code, out, err) == (0, f"{output}\n", "")
    assert sorted(p.name for p in output.iterdir()) == ["model.safetensors", "structure.json"]
    again, structure = checkpoint.load_model(output)
    assert structure["eliminated"] == ["block1_2", "block2_1"] and again(x).equal(model(x))
    assert again.state_dict().keys() == model.state_dict().keys()

    output = tmp_path / "program.pt2"
    code, out, _ = run(folder, "--format", "torch", "--output", output)
    assert (
        code == 0 and out == f"largest difference from the module on random inputs: 0\n{output}\n"
    )
    program = torch.export.load(output)
    assert program.module()(x).equal(model(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("layerprune" in target for target in called)

    output = tmp_path / "program.onnx"
    code, out, _ = run(folder, "--format", "onnx", "--output", output, "--batch", 3)
    assert code == 0 and "largest difference" in out
    (found,) = onnx_outputs(output, input=x)
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)
    with pytest.raises(Exception, match="dimension"):
        onnx_outputs(output, input=x[:2])


OWN = """
from torch import nn
from layerprune import GatedResidual

def dense():
    return nn.Sequential(nn.Linear(4, 4), *(GatedResidual(nn.Linear(4, 4)) for _ in range(3)))
"""


def test_checkpoints_of_a_loop_of_ones_own(run, tmp_path, monkeypatch):
    """With the builder that they do not name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    dense = importlib.import_module("own_network").dense
    model, x = dense(), torch.randn(3, 4)
    pruner = LayerPruner(model, example_inputs=x, total_steps=10, strength=0.1)
    pruner._run.bank.theta[1] = 0.3
    pruner.strip()
    layerprune.save("checkpoint", pruner, example_inputs=x)
    layerprune.save("shapeless", pruner)
    arguments = ("--format", "torch", "--output", "m.pt2")
    code, _, err = run("checkpoint", *arguments)
    assert code == 2 and "names no builder" in err
    code, _, err = run("shapeless", *arguments, "--builder", "own_network:dense")
    assert code == 2 and "save it with example_inputs" in err
    code, out, err = run("checkpoint", *arguments, "--builder", "own_network:dense")
    assert code == 0, err
    assert torch.export.load("m.pt2").module()(x).equal(model(x))


def test_mistakes_on_the_command_line(run, saved, tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.write_text("mine")
    for format in ("safetensors", "torch", "onnx"):
        code, _, err = run(saved[0], "--format", format, "--output", there)
        assert code == 2 and f"{there} exists" in err
    assert there.read_text() == "mine"
    new = tmp_path / "new"
    for batch in ("0", "-1", "many", "1.5"):
        code, _, err = run(saved[0], "--format", "torch", "--output", new, f"--batch={batch}")
        assert code == 2 and "a number of rows or dynamic" in err
    code, _, err = run(saved[0], "--format", "safetensors", "--output", new, "--batch", "2")
    assert code == 2 and "weights alone" in err
    code, _, err = run(tmp_path, "--format", "torch", "--output", new)
    assert code == 2 and "neither a checkpoint nor a run" in err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run(saved[0], "--format", "onnx", "--output", new)
    assert (code, err) == (2, "error: onnxruntime is missing: pip install layerprune[export]\n")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


class Two(nn.Module):
    """Another input beside the batch, and two outputs, one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.section = GatedResidual(nn.Linear(4, 4), activation="relu")

    def forward(self, x, rows, bias, scale=1):
        y = self.section(x) * scale + bias
        return {"y": y, "more": (y.argmax(1) + rows,)}


def test_several_inputs_and_outputs(tmp_path):
    torch.manual_seed(0)
    model = Two()
    inputs = {"x": torch.randn(1, 4), "bias": torch.randn(4), "rows": torch.tensor([3])}
    assert export(model, inputs, tmp_path / "m.pt2", "torch") == 0.0
    inputs |= {"x": torch.randn(6, 4), "rows": torch.arange(6)}
    program, expected = torch.export.load(tmp_path / "m.pt2").module()(**inputs), model(**inputs)
    assert program["y"].equal(expected["y"]) and program["more"][0].equal(expected["more"][0])
    assert export(model, inputs, tmp_path / "m.onnx", "onnx") < 1e-5
    y, more = onnx_outputs(tmp_path / "m.onnx", **inputs)
    np.testing.assert_allclose(y, expected["y"].detach().numpy(), atol=1e-6)
    assert more.tolist() == expected["more"][0].tolist()


class Halves(nn.Module):
    """Runs with two rows only."""

    def forward(self, x):
        first, second = x
        return first + second


class Torn(nn.Module):
    """Depends on its input's values in a way that no program keeps."""

    def forward(self, x):
        return x + 1 if float(x.sum()) > 0 else x


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_models_that_are_refused_leave_no_file(tmp_path, format):
    path, x = tmp_path / "m", torch.randn(2, 4)
    with pytest.raises(ExportError, match="does not take Torn; .*data-dependent"):
        export(Torn(), x, path, format)
    with pytest.raises(ExportError, match="Halves; with a fixed batch size it may"):
        export(Halves(), x, path, format)
    with pytest.raises(ValueError, match=r"on meta: export model.cpu\(\)"):
        export(nn.Linear(4, 4, device="meta"), x, path, format)
    with pytest.raises(ValueError, match="batch must be a whole number"):
        export(nn.Linear(4, 4), x, path, format, batch=0)
    with pytest.raises(ValueError, match="no row"):
        export(nn.Linear(4, 4), x[:0], path, format)
    with pytest.raises(ValueError, match="one of torch, onnx, got 'safetensors'"):
        export(nn.Linear(4, 4), x, path, "safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["residual", "twin", "opaque"])
def test_a_model_with_gates_is_refused(kind, tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return x + self.inner(x)

    if kind == "twin":
        model, x = resnet18(num_classes=3), images(2)
    else:
        block = GatedResidual(nn.Linear(4, 4)) if kind == "residual" else Block()
        model, x = nn.Sequential(nn.Linear(4, 4), block), torch.randn(2, 4)
    pruner = LayerPruner(model, example_inputs=x, total_steps=10, strength=0.1)
    assert {section.kind for section in pruner.sections} == {kind}
    with pytest.raises(ValueError, match=r"still has gates, at '\S+' for one: .*strip\(\)"):
        export(model, x, tmp_path / "m", "torch")
    export(pruner.strip(), x, tmp_path / "m", "torch")


def test_a_wrong_file_is_told_and_deleted(tmp_path, monkeypatch):
    """As by a converter that gets an operation wrong."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(2, 4)
    wrong = nn.Sequential(model[0], nn.BatchNorm1d(4, eps=1e-2)).eval()
    wrong = torch.export.export(wrong, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with monkeypatch.context() as broken:
        broken.setattr(torch.export, "load", lambda file: wrong)
        with pytest.raises(ExportError, match="differs from the module by 0.00"):
            export(model, x, tmp_path / "m.pt2", "torch")
    assert not list(tmp_path.iterdir())

    def full(*arguments):
        arguments[1].write(b"half of it")
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(torch.export, "save", full)
        with pytest.raises(OSError, match="disk full"):
            export(model, x, tmp_path / "m.pt2", "torch")
    assert not list(tmp_path.iterdir())
