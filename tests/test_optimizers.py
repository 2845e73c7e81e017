"""Every optimizer across an elimination: survivors go on bit for bit, what left is forgotten."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

from layerprune import GatedResidual, LayerPruner, find_sections
from layerprune.compaction import remove_sections
from layerprune.optimizers import check_optimizer

KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
}
REFUSED = ("LBFGS", "SparseAdam")
TWO_DIMENSIONAL = ("Muon",)
# Options with which an optimizer keeps all the state that it can keep.
OPTIONS = {
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
}
GONE = ("1.branch.weight", "1.branch.bias", "3.branch.weight", "3.branch.bias")


def _variants():
    for name, kind in KINDS.items():
        if kind is torch.optim.Optimizer or name in REFUSED:
            continue
        yield pytest.param(name, {}, "cpu", id=name)
        yield pytest.param(name, {"lr": torch.tensor(0.01)}, "cpu", id=f"{name}-tensor lr")
        for switch in ("foreach", "fused", "maximize"):
            if switch in inspect.signature(kind).parameters:
                yield pytest.param(name, {switch: True}, "cpu", id=f"{name}-{switch}")
        for switch in ("capturable", "foreach", "fused"):
            if switch in inspect.signature(kind).parameters:
                yield pytest.param(
                    name, {switch: True}, "cuda", id=f"{name}-{switch}-cuda", marks=pytest.mark.gpu
                )


def _model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6),
        GatedResidual(nn.Linear(6, 6), nn.Linear(6, 6), "relu"),
        GatedResidual(nn.Linear(6, 6)),
        GatedResidual(nn.Linear(6, 6), activation="relu"),
        nn.Linear(6, 3),
    )


def _sections(model):
    """The first and the last section."""
    return find_sections(model, torch.zeros(2, 4))[::2]


def _groups(model, two_dimensional=False):
    """Weights, biases, a group that an elimination empties, a frozen one; the head's in none."""
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name != "4.bias" and not (two_dimensional and parameter.dim() != 2)
    ]
    frozen = "2.branch.weight"
    for name, parameter in named:
        parameter.requires_grad_(name != frozen)
    alone = "3.branch.weight"
    weights = [item for item in named if item[1].dim() > 1 and item[0] not in (alone, frozen)]
    groups = [
        {"params": [item for item in named if item[0] == alone], "weight_decay": 0.5},
        {"params": weights, "weight_decay": 0.25},
        {"params": [item for item in named if item[0] == frozen]},
    ]
    biases = [item for item in named if item[1].dim() == 1]
    return [*groups, {"params": biases, "lr": 0.3}] if biases else groups


def _again(optimizer, model, options):
    """An optimizer freshly made on another model, of the same groups.

    Without names, which torch refuses beside an empty group.
    """
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in group["param_names"]]}
        for group in optimizer.param_groups
    ]
    return type(optimizer)(groups, **options)


def _step(model, optimizer, number, without=()):
    """One step on gradients that are a function of its number and of the parameters' names."""
    for index, (name, parameter) in enumerate(_model().named_parameters()):
        generator = torch.Generator().manual_seed(100 * number + index)
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter = dict(model.named_parameters()).get(name)
        if parameter is not None:
            wanted = parameter.requires_grad and name not in without
            parameter.grad = gradient.to(parameter.device) if wanted else None
    optimizer.step()


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _state(model, optimizer):
    """Parameters and their state by name."""
    return {
        name: (parameter.detach(), optimizer.state.get(parameter, {}))
        for name, parameter in model.named_parameters()
    }


def _equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_equal(found[k], expected[k]) for k in found)
    if isinstance(expected, tuple | list):
        return len(found) == len(expected) and all(map(_equal, found, expected))
    return found == expected


@pytest.mark.parametrize("name, options, device", list(_variants()))
def test_survivors_go_on_bit_for_bit(name, options, device):
    """Against one that never lost a parameter, and against one made anew and loaded."""
    options = OPTIONS.get(name, {}) | options
    models = [_model().to(device) for _ in range(2)]
    optimizers = [
        KINDS[name](_groups(model, name in TWO_DIMENSIONAL), **copy.deepcopy(options))
        for model in models
    ]
    (model, whole), (optimizer, reference) = models, optimizers
    for number in range(3):
        _step(model, optimizer, number)
        _step(whole, reference, number)
    groups = [dict(group) for group in optimizer.param_groups]
    before = copy.deepcopy(_state(model, optimizer))

    remove_sections(model, _sections(model), [optimizer])

    after = _state(model, optimizer)
    assert list(after) == [key for key in before if key not in GONE]
    assert len(optimizer.state) == sum(bool(state) for _, state in after.values()) > 0
    assert all(_equal(after[key], before[key]) for key in after)
    for group, was in zip(optimizer.param_groups, groups, strict=True):
        assert group.keys() == was.keys()
        assert all(group[key] is was[key] for key in group)
        named = dict(model.named_parameters())
        assert [id(p) for p in group["params"]] == [id(named[n]) for n in group["param_names"]]
    assert optimizer.param_groups[0]["params"] == []

    loaded = copy.deepcopy(model)
    fresh = _again(optimizer, loaded, copy.deepcopy(options))
    fresh.load_state_dict(_saved(optimizer.state_dict()))
    for number in range(3, 7):
        _step(model, optimizer, number)
        _step(loaded, fresh, number)
        _step(whole, reference, number, without=GONE)
        found, expected = _state(model, optimizer), _state(whole, reference)
        assert _equal(found, {key: expected[key] for key in found})
        assert _equal(_state(loaded, fresh), found)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert [group["param_names"] for group in fresh.param_groups] == names
    assert not _equal(found, before)


def test_hooks_and_groups_that_come_later():
    model = _model()
    optimizer = torch.optim.SGD(_groups(model), lr=0.1, momentum=0.9)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    _step(model, optimizer, 0)
    remove_sections(model, _sections(model), [optimizer])
    optimizer.add_param_group({"params": [("4.bias", model[4].bias)], "lr": 0.5})
    held = model[4].bias.detach().clone()
    _step(model, optimizer, 1)
    assert calls == ["before", "after"] * 2
    assert model[4].bias.equal(held - 0.5 * model[4].bias.grad)
    assert len(optimizer.param_groups) == 5
    # The names that left may come again.
    optimizer.add_param_group({"params": [("3.branch.weight", nn.Parameter(torch.ones(1)))]})
    optimizer.zero_grad()
    assert model[4].bias.grad is None


def test_parameters_without_names_and_a_shared_one():
    """What a branch shares with the rest of the model stays, with its state."""
    model = _model()
    model[3].branch.weight = model[2].branch.weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    _step(model, optimizer, 0)
    remove_sections(model, _sections(model), [optimizer])
    assert "param_names" not in optimizer.param_groups[0]
    assert set(optimizer.state) == set(model.parameters())
    assert any(p is model[2].branch.weight for p in optimizer.param_groups[0]["params"])


class Foreign(torch.optim.Optimizer):
    """As other libraries make them: state by other keys, and attributes of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "schedule": [1, 2, 3]})
        self.averages = {"seen": [torch.zeros(1)]}
        self.state["run"] = {"count": torch.zeros(1)}

    @torch.no_grad()
    def step(self):
        self.state["run"]["count"] += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["last"] = parameter.grad.clone()
                    parameter -= group["lr"] * parameter.grad


def test_an_optimizer_of_another_library():
    model = _model()
    optimizer = Foreign(_groups(model))
    check_optimizer(model, optimizer)
    _step(model, optimizer, 0)
    remove_sections(model, _sections(model), [optimizer])
    _step(model, optimizer, 1)
    held = {p for p in model.parameters() if p.grad is not None and p is not model[4].bias}
    assert set(optimizer.state) == {"run", *held}
    assert optimizer.state["run"]["count"] == 2 and optimizer.averages["seen"][0] == 0
    assert all(group["schedule"] == [1, 2, 3] for group in optimizer.param_groups)


class Handing(torch.optim.Optimizer):
    """A wrapper that keeps nothing."""

    def __init__(self, inner):
        self.inner = inner

    state = property(lambda self: self.inner.state)
    param_groups = property(lambda self: self.inner.param_groups)

    def step(self):
        self.inner.step()


class Slow(Handing):
    """A wrapper that keeps state of its own."""

    def __init__(self, inner):
        super().__init__([inner])
        self.slow = {}

    state = property(lambda self: self.slow)
    param_groups = property(lambda self: self.inner[0].param_groups)


def test_a_wrapper_that_keeps_nothing_is_served():
    model = _model()
    inner = torch.optim.Adam(_groups(model), lr=0.1)
    wrapper = Handing(inner)
    check_optimizer(model, wrapper)
    _step(model, wrapper, 0)
    remove_sections(model, _sections(model), [wrapper])
    named = dict(model.named_parameters())
    assert inner.param_groups[1]["param_names"] == [
        n for n, p in named.items() if p.dim() > 1 and n != "2.branch.weight"
    ]
    assert set(inner.state) == {p for p in named.values() if p.grad is not None} - {model[4].bias}


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS"),
        (lambda model: torch.optim.SparseAdam(model.parameters()), TypeError, "SparseAdam"),
        (lambda model: "sgd", TypeError, "must be a torch.optim.Optimizer, got str"),
        (
            lambda model: torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1),
            ValueError,
            "none of the model's parameters",
        ),
        (
            lambda model: Slow(torch.optim.SGD(model.parameters(), lr=0.1)),
            TypeError,
            "Slow wraps SGD.*use SGD itself",
        ),
        (
            lambda model: PostLocalSGDOptimizer(torch.optim.SGD(model.parameters()), None),
            TypeError,
            "PostLocalSGDOptimizer.*optimizer of torch.optim",
        ),
        (
            lambda model: ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1),
            TypeError,
            "ZeroRedundancyOptimizer.*optimizer of torch.optim",
        ),
    ],
)
def test_optimizers_that_are_refused(one_rank, make, error, message):
    """In the first step, before anything is changed."""
    model = _model()
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 4), total_steps=100, strength=0.1)
    with pytest.raises(error, match=message):
        pruner.step(make(model))
    assert pruner.step_count == 0 and len(pruner._run.where("open")) == 3


def test_an_optimizer_of_branches_alone_is_emptied():
    """Whose other parameters are all frozen; what is left of the sections may still leave."""
    model = _model()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9)
    config = {"total_steps": 100, "strength": 0.1, "example_inputs": torch.zeros(2, 4)}
    pruner = LayerPruner(model, **config)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    pruner.step(optimizer)
    for index in (2, 0):
        pruner._eliminate([index], [optimizer])
        assert optimizer.param_groups[0]["params"] == [] and not optimizer.state
    optimizer.step()
    pruner.step(optimizer)
    assert [info.status for info in pruner.sections] == ["eliminated", "open", "eliminated"]


@pytest.mark.parametrize("scaled", [False, True])
def test_several_optimizers_share_a_model(scaled):
    """As Muon, which takes matrices alone, needs another beside it; either's overflow counts."""
    torch.manual_seed(0)
    sections = [GatedResidual(nn.Linear(4, 4)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 4), *sections, nn.Linear(4, 2))
    named = list(model.named_parameters())
    optimizers = [
        torch.optim.Muon([(n, p) for n, p in named if p.dim() == 2]),
        torch.optim.AdamW([(n, p) for n, p in named if p.dim() == 1], lr=0.01),
    ]
    # By the strength no section is worth its place.
    pruner = LayerPruner(model, example_inputs=torch.zeros(2, 3), total_steps=40, strength=1000.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
    left_out = [9, 13] if scaled else []
    skipped = []
    for step in range(40):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean()).backward()
        if step in left_out:  # once in what the first holds, once in the second's
            model[0].get_parameter(("weight", "bias")[left_out.index(step)]).grad.fill_(torch.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
        pruner.step(optimizers, scaler)
        skipped += [step] * pruner.state_dict()["evidence"][-1]["skipped"]
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert skipped == left_out
    assert pruner.structure()["eliminated"] == ["1", "2", "3"]
    names = [optimizer.param_groups[0]["param_names"] for optimizer in optimizers]
    assert names == [["0.weight", "4.weight"], ["0.bias", "4.bias"]]
    assert all(len(optimizer.state) == 2 for optimizer in optimizers)
    with pytest.raises(TypeError, match="empty list"):
        pruner.step([])
    with pytest.raises(TypeError, match="got str"):
        pruner.step([optimizers[0], "adam"])
