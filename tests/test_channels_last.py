"""A model in channels_last stays so, in every gated section and after every elimination."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from layerprune import LayerPruner
from layerprune.compaction import verify
from layerprune.gate import Gate
from layerprune.models import build
from layerprune.sections import find_sections

ROWS, STEPS = 24, 40


def resnet20():
    return build("resnet20", width=4, image_size=16, in_channels=3, shortcut="B")


def torchvision_blocks():
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [3, 2, 1, 1], num_classes=10)


def watch(model, sections, notes):
    """Notes the layouts of what goes through each section and its branch, both ways."""

    def note(name, tensor):
        # One row, or one pixel, has both layouts; a dry run has none.
        if type(tensor) is torch.Tensor and tensor.shape[0] > 1 and min(tensor.shape[2:]) > 1:
            notes.append((name, tensor.is_contiguous(memory_format=torch.channels_last)))

    def hook(name):
        def call(module, args, output):
            note(f"{name} input", args[0])
            note(f"{name} output", output)
            # Not the output's gradient, whose layout is the next module's choice.
            if args[0].grad_fn is not None:
                args[0].register_hook(lambda grad: note(f"{name} input gradient", grad))

        return call

    for section in sections:
        section.module.register_forward_hook(hook(section.name))
        convolution = getattr(section.module, "branch", [getattr(section.module, "conv1", None)])[0]
        convolution.register_forward_hook(hook(f"{section.name} convolution"))


def train(model, x):
    target = torch.arange(ROWS) % 10
    pruner = LayerPruner(model, example_inputs=x, total_steps=STEPS, strength=0.3, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.detach())
    return pruner, torch.stack(losses)


@pytest.mark.parametrize("make", [resnet20, torchvision_blocks])
def test_layouts_of_a_run_and_of_what_it_leaves(make):
    torch.manual_seed(0)
    dense = make().to(memory_format=torch.channels_last)
    x = torch.randn(ROWS, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    model = copy.deepcopy(dense)
    notes = []
    watch(model, find_sections(model, x), notes)
    pruner, _ = train(model, x)

    assert len(notes) > STEPS and {name for name, ok in notes if not ok} == set()
    assert {"gradient"} <= {name.split()[-1] for name, _ in notes}

    gone = pruner.structure()["eliminated"]
    compacted = pruner.strip()
    for section in find_sections(dense, x):
        if section.name in gone:
            gate = Gate(section.name)
            gate.is_open = False
            section.attach(gate)
    assert not dense.load_state_dict(compacted.state_dict(), strict=False).unexpected_keys
    assert verify(dense, compacted, [x]) == 0.0
    for module in compacted.modules():
        if isinstance(module, nn.Conv2d) and min(module.weight.shape) > 1:
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [resnet20, torchvision_blocks])
def test_a_run_is_that_of_the_contiguous_model(make):
    torch.manual_seed(0)
    # In double precision: no decision hangs on how a layout's kernels round.
    dense = make().double()
    x = torch.randn(ROWS, 3, 16, 16, dtype=torch.float64)
    plain, expected = train(copy.deepcopy(dense), x)
    x = x.contiguous(memory_format=torch.channels_last)
    pruner, found = train(dense.to(memory_format=torch.channels_last), x)

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    events = [[(e.step, e.section, e.decision) for e in p.events] for p in (plain, pruner)]
    assert events[0] == events[1]
    assert sum(event[2] == "eliminated" for event in events[1]) >= 2
