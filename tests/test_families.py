"""Unedited models of the families that people use, from finding their sections to a plain model."""

import copy
import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import layerprune
from layerprune import LayerPruner, verify
from layerprune.calls import as_call
from layerprune.compaction import remove_sections
from layerprune.gate import Gate
from layerprune.sections.discovery import survey
from layerprune.sections.placeholders import PassThrough

ROWS, STEPS = 6, 20
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
TABLED = json.loads((RESULTS / "families.json").read_text())["rows"]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A model whose weights and statistics are not the initial ones: every branch matters."""
    family = FAMILIES[request.param]
    pytest.importorskip(family.library)
    torch.manual_seed(0)
    model = family.build()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.2 * torch.rand_like(value) - 0.1)
    inputs = family.inputs(ROWS)
    found = survey(model, inputs)
    return SimpleNamespace(
        family=family, model=model, inputs=inputs, sections=found.sections, left_out=found.left_out
    )


def _pruner(case):
    model = copy.deepcopy(case.model)
    sections = [section.in_model(model) for section in case.sections]
    pruner = LayerPruner(
        model, example_inputs=case.inputs, total_steps=1000, strength=0.01, sections=sections
    )
    return pruner, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _output(model, inputs):
    args, kwargs = as_call(inputs)
    found = model(*args, **kwargs)
    return getattr(found, "logits", found)


def _evaluated(model, inputs):
    with torch.no_grad():
        return _output(model.eval(), inputs)


def _loss(model, inputs):
    scores = _output(model.train(), inputs)
    scores = scores.reshape(-1, scores.shape[-1])
    return F.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[-1])


def _modules_of(section):
    """Names of the modules that compute what a section adds."""
    return [link.name for link in section.links] if section.kind == "branch" else [section.name]


def _within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _goes(key, section):
    """Whether a weight goes with a section: a ResNet's downsampling shortcut stays."""
    kept = f"{section.name}.downsample." if section.kind == "twin" else " "
    return _within(key, _modules_of(section)) and not key.startswith(kept)


def test_sections(case):
    """As expected, and as the tables say."""
    family = case.family
    assert Counter(section.kind for section in case.sections) == family.sections
    assert all(re.fullmatch(family.names, section.name) for section in case.sections)
    assert len(case.left_out) == family.left_out
    (row,) = [row for row in TABLED if FAMILIES[row["family"]] is family]
    told = [{"name": section.name, "kind": section.kind} for section in case.sections]
    assert row["sections"] == told, "run: python benchmarks/verify_families.py"
    assert row["left_out"] == case.left_out


def test_from_training_to_a_plain_model(case, tmp_path):
    inputs, path = case.inputs, tmp_path / "checkpoint"
    pruner, optimizer = _pruner(case)
    model = pruner.model
    with FlopCounterMode(display=False) as dense, torch.no_grad():
        _loss(case.model, inputs)
    with FlopCounterMode(display=False) as gated, torch.no_grad():
        _loss(model, inputs)
    assert 0 < gated.get_total_flops() < dense.get_total_flops(), "rows are skipped"
    for _ in range(STEPS):
        loss = _loss(model, inputs)
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    assert bool(loss.isfinite())

    # What evaluation runs, what a checkpoint gives, and what an elimination leaves.
    gone = [0, len(case.sections) - 1]
    pruner._run.bank.theta.fill_(1.0)
    pruner._run.bank.advance()
    whole = _evaluated(model, inputs)
    for twin in _copies(model):
        assert _evaluated(twin, inputs).equal(whole)
        assert list(twin.state_dict()) == list(model.state_dict())
    pruner._run.bank.theta[gone] = 0.0
    pruner._run.bank.advance()
    expected = _evaluated(model, inputs)
    assert not expected.equal(whole)
    layerprune.save(path, pruner)
    loaded = layerprune.load(path, case.family.build)
    assert verify(model, loaded, [inputs]) == 0.0
    pruner._eliminate(gone, [optimizer])
    assert verify(model, loaded, [inputs]) == 0.0
    assert _evaluated(model, inputs).equal(expected)

    # The optimizer goes on with what is left.
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, held)) == list(map(id, model.parameters()))
    assert optimizer.state.keys() <= set(held)
    _loss(model, inputs).backward()
    optimizer.step()
    pruner.step(optimizer)

    plain = pruner.strip()
    removed = [pruner._run.sections[index] for index in gone]
    keys = [key for key in case.model.state_dict() if not any(_goes(key, s) for s in removed)]
    assert list(plain.state_dict()) == keys
    _check_plain(plain, case.model, [name for s in removed for name in _modules_of(s)])
    expected = _evaluated(plain, inputs)
    layerprune.save(path, pruner)
    assert _evaluated(layerprune.load(path, case.family.build), inputs).equal(expected)


def _check_plain(plain, dense, places):
    """Original classes without hooks, but where something was removed."""
    original = dict(dense.named_modules())
    for name, module in plain.named_modules():
        if _within(name, places):
            kept = original.get(name)
            left = (nn.Identity, PassThrough, nn.Sequential, nn.ReLU)
            assert isinstance(module, left) or type(module) is type(kept), name
        else:
            assert type(module) is type(original[name]), name
        for kind in HOOKS:
            count = len(getattr(original[name], kind)) if name in original else 0
            assert len(getattr(module, kind)) == count, (name, kind)


def _copies(model):
    yield copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def _with_gradient(model, inputs):
    model.eval().zero_grad()
    _output(model, inputs).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def test_a_block_without_its_sections(case):
    """Nothing is left of a block that only adds; gradients reach all that is left elsewhere."""
    block = case.family.block
    chosen = [section for section in case.sections if _within(section.name, [block])]
    assert chosen
    gated, compacted = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for section in case.sections:
        gate = Gate(section.name)
        gate.is_open = section not in chosen
        section.in_model(gated).attach(gate)
    remove_sections(compacted, [section.in_model(compacted) for section in chosen])
    assert verify(gated, compacted, [case.inputs]) == 0.0
    assert verify(case.model, compacted, [case.inputs]) > 0
    left = compacted.get_submodule(block)
    assert isinstance(left, nn.Identity | PassThrough) == case.family.vanishes
    before, after = (_with_gradient(model, case.inputs) for model in (case.model, compacted))
    kept = {name for name in before if not any(_goes(name, s) for s in chosen)}
    if case.family.vanishes:  # with the norm in front of parallel branches
        kept = {name for name in kept if not _within(name, [block])}
    assert after == kept
    assert all(bool(p.grad.isfinite().all()) for p in compacted.parameters() if p.grad is not None)
    case.model.zero_grad()
