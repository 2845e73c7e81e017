"""Which sections a network is left before it is trained, where a method knows only how many."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerprune.sections import Section
from layerprune.training.sampling import train_loader

if TYPE_CHECKING:
    from study.methods import Setup

_GRASP_IMAGES = 256


def nothing(setup: Setup, model: nn.Module, sections: list[Section]) -> list[str]:
    """Leaves all sections."""
    return []


def as_reference(setup: Setup, model: nn.Module, sections: list[Section]) -> list[str]:
    """Leaves the very sections that `ours` has kept."""
    return [s.name for s in sections if s.name not in setup.reference["kept"]]


def at_random(setup: Setup, model: nn.Module, sections: list[Section]) -> list[str]:
    """Leaves as many as `ours` has kept, drawn by the seed."""
    count = len(sections) - setup.reference["sections_kept"]
    generator = np.random.default_rng([setup.recipe.seed, 1])
    return [sections[i].name for i in generator.choice(len(sections), count, replace=False)]


def first_of_stages(setup: Setup, model: nn.Module, sections: list[Section]) -> list[str]:
    """Leaves as many, as a network of that depth has them: the first ones of every stage.

    Stages, told by the number before a name's underscore or dot ("block1_2", "layer1.2"), get
    equally many, the earlier ones what is left over, and what a stage is too small for.
    """
    stages = [
        [section.name for section in stage]
        for _, stage in groupby(sections, lambda s: re.match(r"\D*(\d+[_.])?", s.name)[0])
    ]
    taken = [0] * len(stages)
    left = setup.reference["sections_kept"]
    while left:
        for number, stage in enumerate(stages):
            if left and taken[number] < len(stage):
                taken[number] += 1
                left -= 1
    return [name for stage, count in zip(stages, taken, strict=True) for name in stage[count:]]


def by_gradient_flow(setup: Setup, model: nn.Module, sections: list[Section]) -> list[str]:
    """Leaves as many, chosen on some training images as GraSP chooses weights.

    Wang, Zhang and Grosse, "Picking winning tickets before training by preserving gradient flow"
    (2020), score a weight by -w (H g)_w, to first order (half of) what the squared norm of the
    gradient gains when the weight is set to 0, and remove those that score highest. A section's
    score is the sum over its branch.
    """
    loader = train_loader(setup.splits, _GRASP_IMAGES, seed=setup.recipe.seed, epoch=0)
    images, labels = next(iter(loader))
    scores = gradient_flow_scores(model, sections, images.to(setup.device), labels.to(setup.device))
    ranked = sorted(zip(scores, sections, strict=True), key=lambda pair: -pair[0])
    count = len(sections) - setup.reference["sections_kept"]
    return [section.name for _, section in ranked[:count]]


def gradient_flow_scores(
    model: nn.Module, sections: list[Section], images: Tensor, labels: Tensor
) -> list[float]:
    """Each section's GraSP score; running statistics of the model are left as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flow = sum((g * g.detach()).sum() for g in gradients)
    products = dict(zip(parameters, torch.autograd.grad(flow, parameters), strict=True))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return [
        -sum(float((p.detach() * products[p]).sum()) for p in section.branch_parameters())
        for section in sections
    ]
