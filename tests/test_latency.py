"""`cost="latency"`: what is run to measure it, what is left alone, and what follows from it."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
import torchvision
from processes import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, LlamaConfig, LlamaForCausalLM

from layerprune import GatedResidual, LayerPruner, find_sections, latency
from layerprune import pruner as pruner_module
from layerprune.latency import section_latencies
from layerprune.training import data
from layerprune.training import recipe as recipes
from layerprune.training.assembly import build_network


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """One run at a time: nothing here depends on how long it takes."""
    monkeypatch.setattr(latency, "_MOST_RUNS", 1)


class Encoder(nn.Module):
    """Transformer layers with a mask that they share."""

    def __init__(self):
        super().__init__()
        layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 2)

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(x.mean(1))


def _convolutions():
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8))
    branch = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout()
    )
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        GatedResidual(branch, shortcut, nn.ReLU()),
        GatedResidual(nn.Conv2d(8, 8, 3, padding=1), None, "relu"),
        nn.Flatten(),
    )


def _vit():
    return torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        dropout=0.1,
        num_classes=3,
    )


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


MODELS = {
    "residual": (_convolutions, lambda: torch.randn(3, 3, 8, 8), ("1.branch", "2.branch")),
    "twin": (
        lambda: torchvision.models.resnet18(num_classes=4),
        lambda: torch.randn(2, 3, 32, 32),
        tuple(f"layer{n}.{m}.{part}{k}" for n in range(1, 5) for m in (0, 1)
              for part in ("conv", "bn") for k in (1, 2)),
    ),
    "twin of timm": (
        lambda: pytest.importorskip("timm").create_model("resnet18", num_classes=4),
        lambda: torch.randn(2, 3, 32, 32),
        tuple(f"layer{n}.{m}.{part}" for n in range(1, 5) for m in (0, 1)
              for part in ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2")),
    ),
    "branch": (
        _vit,
        lambda: torch.randn(3, 3, 8, 8),
        tuple(f"encoder.layers.encoder_layer_{n}.{part}" for n in (0, 1)
              for part in ("ln_1", "self_attention", "dropout", "ln_2", "mlp")),
    ),
    "opaque": (
        Encoder,
        lambda: {"x": torch.randn(3, 5, 8), "mask": torch.zeros(5, 5)},
        ("layers.0", "layers.1"),
    ),
    "branch of tuples": (
        _llama,
        lambda: {"input_ids": torch.randint(9, (3, 5)), "attention_mask": torch.ones(3, 5).long()},
        tuple(f"model.layers.{n}.{part}" for n in (0, 1)
              for part in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")),
    ),
}  # fmt: skip


def _made(name, seed=0):
    torch.manual_seed(seed)
    model, inputs, inside = MODELS[name]
    return model().train(), inputs(), inside


def _calls(model):
    """Counts each module's calls from now on."""
    calls = {name: 0 for name, _ in model.named_modules()}
    for name, module in model.named_modules():

        def hook(module, args, kwargs, name=name):
            calls[name] += 1

        module.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_section_is_measured(name):
    model, inputs, _ = _made(name)
    sections = find_sections(model, inputs)
    assert {section.kind for section in sections} == {name.split()[0]}
    found = section_latencies(model, inputs, sections, repeats=1)
    assert list(found) == [section.name for section in sections]
    assert all(0 < seconds < math.inf for seconds in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_branches_run_alone_after_one_forward(name):
    """What stays when they go runs in that forward only; a ReLU may serve both."""
    model, inputs, inside = _made(name)
    sections = find_sections(model, inputs)
    calls = _calls(model)
    section_latencies(model, inputs, sections, repeats=3)
    times = 1 + 2 + 3  # the forward, warm-up, turns
    for module, count in calls.items():
        within = any(f"{module}.".startswith(f"{part}.") for part in inside)
        if name == "twin" and module.endswith(".relu"):
            assert count == times + 1
        else:  # containers and attention's projections are never called
            assert count in (times if within else 1, 0), module
    assert all(calls[part] == times for part in inside)


def _state(model):
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "same": {name: (id(p), id(p.grad)) for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def _assert_same(one, other):
    flat = [torch.utils._pytree.tree_flatten(state) for state in (one, other)]
    assert flat[0][1] == flat[1][1]
    for a, b in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_model_changes(name):
    """Nor of the inputs; a part is in evaluation mode, some parameters have gradients."""
    model, inputs, _ = _made(name)
    sections = find_sections(model, inputs)
    sections[0].module.eval()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.full_like(parameter, 3.0)
    before, given = _state(model), copy.deepcopy(inputs)
    section_latencies(model, inputs, sections, repeats=1)
    _assert_same(before, _state(model))
    _assert_same(given, inputs)


def test_modules_train_while_they_are_measured():
    """All of a model in evaluation mode; of one in training mode, those that train in it."""
    model, inputs, _ = _made("residual")
    sections = find_sections(model, inputs)
    seen = set()
    model[1].branch[2].register_forward_hook(lambda module, *_: seen.add(module.training))
    section_latencies(model.eval(), inputs, sections, repeats=1)
    assert seen == {True} and not any(module.training for module in model.modules())
    model.train()[1].branch[2].eval()
    seen.clear()
    section_latencies(model, inputs, sections, repeats=1)
    assert seen == {False}


def test_each_run_has_arguments_of_its_own():
    """A cache that attention adds to does not grow from run to run."""
    model, inputs, _ = _made("branch of tuples")
    sections = find_sections(model, inputs)
    found = []

    def hook(module, args, kwargs):
        (cache,) = (value for value in kwargs.values() if isinstance(value, Cache))
        found.append(cache.get_seq_length(module.layer_idx))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    section_latencies(model, inputs, sections, repeats=2)
    assert len(found) > 2 and set(found) == {0}


def test_gradients_are_taken_where_training_takes_them(monkeypatch):
    """The model's input needs none, nor do frozen parameters."""
    model = nn.Sequential(*(GatedResidual(nn.Linear(4, 4)) for _ in range(3)))
    model[1].requires_grad_(False)
    inputs = torch.randn(3, 4)
    sections = find_sections(model, inputs)
    taken, take = [], torch.autograd.grad

    def spy(outputs, wanted, *others, **options):
        taken.append([tuple(each.shape) for each in wanted])
        found = take(outputs, wanted, *others, **options)
        assert all(gradient is not None for gradient in found)
        return found

    monkeypatch.setattr(torch.autograd, "grad", spy)
    section_latencies(model, inputs, sections, repeats=1)
    given, weights = [(3, 4)], [(4, 4), (4,)]
    assert taken[-3:] == [weights, given, given + weights]
    taken.clear()
    found = section_latencies(model.requires_grad_(False), inputs, sections, repeats=1)
    assert not taken and all(seconds > 0 for seconds in found.values())


def test_hooks_on_a_branch_see_the_call_once():
    model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), nn.Linear(4, 2))
    inputs, seen = torch.randn(3, 4), []
    sections = find_sections(model, inputs)
    model[0].branch.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].branch.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    section_latencies(model, inputs, sections, repeats=2)
    assert len(seen) == 5 and all(given.equal(2 * inputs) for given in seen)


class Casts(TorchDispatchMode):
    """Counts how often weights of 4 x 4 are cast to bfloat16."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].shape == (4, 4):
            self.count += kwargs["dtype"] == torch.bfloat16
        return function(*args, **(kwargs or {}))


def test_the_callers_precision_is_measured():
    """With the casts of the weights, which each step makes anew."""
    model = nn.Sequential(GatedResidual(nn.Linear(4, 4)), nn.Linear(4, 2))
    inputs, seen = torch.randn(3, 4), []
    sections = find_sections(model, inputs)
    model[0].branch.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        section_latencies(model, inputs, sections, repeats=2)
    assert seen == 5 * [torch.bfloat16] and casts.count == 5


@pytest.mark.gpu
def test_inputs_are_brought_to_the_models_device():
    model, inputs, _ = _made("twin")
    sections = find_sections(model.cuda(), inputs)
    random = torch.cuda.get_rng_state()
    found = section_latencies(model, inputs, sections, repeats=2)
    assert all(seconds > 0 for seconds in found.values()) and inputs.device.type == "cpu"
    assert torch.cuda.get_rng_state().equal(random)


class Words(nn.Module):
    def __init__(self, skips=False):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.sections = nn.ModuleList(GatedResidual(nn.Linear(4, 4)) for _ in range(2))
        self.skips = skips

    def forward(self, words):
        x = self.embedding(words)
        for section in self.sections:
            if not (self.skips and self.training):
                x = section(x)
        return x


@pytest.mark.parametrize(
    "model, words, message",
    [
        (Words, [[0, 9]], "index out of range"),
        (lambda: Words().to("meta"), [[0, 1]], "meta device"),
        (lambda: Words(skips=True), [[0, 1]], "section 'sections.0' does not run"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, words, message):
    """With the remedy, and the model is as it was."""
    model = model()
    before = _state(model) if not model.embedding.weight.is_meta else None
    with pytest.raises(ValueError, match=f"{message}.*example_inputs.*another cost"):
        LayerPruner(
            model,
            example_inputs=torch.tensor(words),
            total_steps=100,
            strength=0.1,
            cost="latency",
        )
    if before:
        _assert_same(before, _state(model))


def test_a_turn_of_each_section_after_another_and_the_median_of_all(monkeypatch):
    """By a clock that a section's runs move on; a disturbed turn does not count."""
    monkeypatch.setattr(latency, "_MOST_RUNS", 20)
    model = nn.Sequential(*(GatedResidual(nn.Linear(4, 4)) for _ in range(3)))
    inputs = torch.randn(3, 4)
    takes = {"0": 0.012, "1": 0.05, "2": 0.0001}
    now, runs = 0.0, []

    def run(branch, *arguments):
        nonlocal now
        runs.append(branch.name)
        now += 60.0 if branch.name == "1" and runs.count("1") == 4 else takes[branch.name]

    monkeypatch.setattr(latency._Branch, "_run", run)
    monkeypatch.setattr(latency._Branch, "_clock", lambda branch: now)
    found = section_latencies(model, inputs, find_sections(model, inputs), repeats=3)
    assert found == pytest.approx(takes)
    warm_up = ["0", "0", "1", "1", "2", "2"]
    assert runs == warm_up + 3 * (["0"] * 2 + ["1"] + ["2"] * 20)


def _timed(monkeypatch, seconds):
    """Has branches take these seconds, by section name."""
    monkeypatch.setattr(latency._Branch, "seconds", lambda branch, runs: seconds[branch.name])


def _pruner(cost="latency", strength=0.3):
    torch.manual_seed(0)
    blocks = [GatedResidual(nn.Linear(4, 4)) for _ in range(3)]
    return LayerPruner(
        nn.Sequential(*blocks, nn.Linear(4, 2)),
        example_inputs=torch.zeros(2, 4),
        total_steps=100,
        strength=strength,
        cost=cost,
    )


def test_penalties_are_in_proportion_to_what_was_measured(monkeypatch):
    _timed(monkeypatch, {"0": 0.003, "1": 0.001, "2": 0.002})
    sections = _pruner().sections
    assert [info.cost for info in sections] == pytest.approx([1.5, 0.5, 1.0])
    assert [info.penalty for info in sections] == pytest.approx([0.45, 0.15, 0.3])


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_keeps_its_penalties(monkeypatch):
    """Whatever is measured when it goes on: the rest of it is the run that was not stopped."""

    def steps(pruner, optimizer, first, last):
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 4, generator=generator)
            loss = (pruner.model(x) - x[:, :2]).square().mean()
            loss.backward()
            optimizer.step()
            pruner.step(optimizer)
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    _timed(monkeypatch, {"0": 0.003, "1": 0.001, "2": 0.002})
    pruner = _pruner()
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.1)
    steps(pruner, optimizer, 0, 20)
    state, weights = _saved(pruner.state_dict()), _saved(pruner.model.state_dict())
    losses = steps(pruner, optimizer, 20, 100)
    _timed(monkeypatch, {"0": 0.001, "1": 0.005, "2": 0.001})
    resumed = _pruner()
    assert resumed.sections != _pruner("uniform").sections
    resumed.load_state_dict(state)
    resumed.model.load_state_dict(weights)
    optimizer = torch.optim.SGD(resumed.model.parameters(), lr=0.1)
    assert steps(resumed, optimizer, 20, 100) == losses
    assert resumed.sections == pruner.sections and resumed.events == pruner.events
    assert resumed.digest() == pruner.digest()
    assert {event.penalty for event in resumed.events} <= {i.penalty for i in pruner.sections}
    assert resumed.events


def test_states_of_another_strength_or_cost_are_refused(monkeypatch):
    _timed(monkeypatch, dict.fromkeys("012", 0.001))
    measured, uniform = _pruner().state_dict(), _pruner("uniform").state_dict()
    assert measured["penalty"].equal(uniform["penalty"])
    penalty = measured["penalty"]
    for cost, strength, state in [
        ("latency", 0.31, measured),
        ("uniform", 0.3, measured),
        ("latency", 0.3, uniform),
        ("latency", 0.3, measured | {"penalty": penalty * torch.tensor([2.0, 2.0, -1.0])}),
        ("latency", 0.3, measured | {"penalty": penalty * math.nan}),
        ("latency", 0.3, measured | {"penalty": penalty[:2]}),
        ("latency", 0.3, measured | {"penalty": penalty.double()}),
    ]:
        pruner = _pruner(cost, strength)
        with pytest.raises(ValueError, match="another strength, cost"):
            pruner.load_state_dict(state)
        assert pruner.sections == _pruner(cost, strength).sections
    with pytest.raises(ValueError, match="damaged: measured"):
        _pruner().load_state_dict(measured | {"measured": "yes"})


def test_a_state_that_does_not_say_whether_its_costs_were_measured(monkeypatch):
    """As older versions wrote it."""
    state = _pruner("flops").state_dict()
    del state["measured"]
    _pruner("flops").load_state_dict(state)


def _told(rank, seconds):
    with pytest.MonkeyPatch.context() as patch:
        _timed(patch, seconds[rank])
        pruner = _pruner()
    return [info.cost for info in pruner.sections], pruner.digest()


@pytest.mark.cpu_only("gloo")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="no gloo")
def test_ranks_take_the_mean_of_what_they_measured():
    seconds = [{"0": 1.0, "1": 2.0, "2": 3.0}, {"0": 5.0, "1": 2.0, "2": 11.0}]
    one, two = run_ranks(_told, 2, seconds)
    assert one == two and one[0] == pytest.approx([0.75, 0.5, 1.75])


@pytest.mark.parametrize("ranks, amp", [(1, False), (2, True)])
def test_a_recipe_is_measured_as_it_is_trained(monkeypatch, ranks, amp):
    """On a rank's batch, in its precision."""
    chosen = recipes.load("digits-resnet32")
    chosen = replace(chosen, cost="latency", model_args={"width": 2}, batch_size=32, amp=amp)
    seen = []

    def measured(model, example_inputs, sections):
        seen.append((len(example_inputs), torch.is_autocast_enabled("cpu")))
        return {section.name: 1.0 + index for index, section in enumerate(sections)}

    monkeypatch.setattr(pruner_module, "section_latencies", measured)
    network = build_network(chosen, data.load("digits"), torch.device("cpu"), ranks)
    assert seen == [(32 // ranks, amp)]
    assert [info.cost for info in network.pruner.sections] == pytest.approx(
        [(1 + n) / 8 for n in range(15)]
    )
