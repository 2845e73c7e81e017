"""The study's methods, against what they are said to be; its grid; what it resumes."""

import json
import math
from dataclasses import replace

import pytest
import torch
import training
import yaml
from study import grid, latency, reinsertion, selection
from study.execution import Job, collected, run_all, with_needs
from study.gating import FixedGates, HardConcreteGates, scale, scaled_layer
from study.grid import Cell, StudyError
from study.initialisation import SCHEMES, initialise
from study.methods import GIVEN_DEPTH, METHODS, Setup
from study.optimality import section_differences
from study.trial import load_images, plain_network, run
from torch import nn
from torch.nn import functional as F

from layerprune import GatedResidual, models
from layerprune.sections import find_sections
from layerprune.training import recipe

SMALL = {
    "dataset": "digits",
    "model": "resnet20",
    "model_args": {"width": 2},
    "train_subset": 128,
    "epochs": 4,
    "batch_size": 16,
    "lr": 0.05,
    "strength": 0.2,
}
FACTS = {"commit": "c" * 40, "device": "a processor"}
REFERENCE = {"sections_kept": 4, "kept": ["block1_1", "block2_3", "block3_1", "block3_2"]}


@pytest.fixture(scope="module")
def setup():
    one = recipe.from_mapping({"name": "x", **SMALL}, "x")
    splits, held_out = load_images(one, None, 100)
    return Setup(one, splits, torch.device("cpu"), reference=REFERENCE), held_out


def test_held_out_images_are_not_trained_on(setup):
    splits, held_out = setup[0].splits, setup[1]
    assert (len(splits.train), len(held_out)) == (128, 100)
    trained = {tuple(image.flatten().tolist()) for image in splits.train.pixels}
    assert not trained & {tuple(image.flatten().tolist()) for image in held_out.pixels}
    assert splits.train.augmentation is not None and held_out.augmentation is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_plain_network(setup, method):
    result, model = run(method, *setup)
    again, _ = run(method, *setup)
    timed = {"train_seconds", "overhead_seconds"}
    assert {k: v for k, v in result.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }
    left = find_sections(model, torch.zeros(2, 1, 8, 8))
    assert [section.name for section in left] == result["kept"] == list(result["differences"])
    assert not any(section.is_gated for section in left)
    assert result["sections"] == 9 and 0 < result["train_flops"] <= 1
    if method in GIVEN_DEPTH:
        assert result["sections_kept"] == 4
    if method in ("dense", "stochastic-depth-dense"):
        assert result["train_flops"] == result["inference_flops"] == 1
    if method == "stochastic-depth":
        assert 0.6 < result["train_flops"] < 0.85  # on average 1/4 of the rows are left out


def test_what_is_chosen_before_training(setup):
    model = models.build("resnet20", width=2, in_channels=1, image_size=8)
    sections = find_sections(model, torch.zeros(2, 1, 8, 8))
    names = {section.name for section in sections}
    kept = names - set(selection.first_of_stages(setup[0], model, sections))
    assert kept == {"block1_1", "block1_2", "block2_1", "block3_1"}
    assert names - set(selection.as_reference(setup[0], model, sections)) == set(REFERENCE["kept"])
    drawn = [
        frozenset(selection.at_random(replace(setup[0], recipe=one), model, sections))
        for one in (replace(setup[0].recipe, seed=seed) for seed in range(5))
    ]
    assert all(len(gone) == 5 for gone in drawn) and len(set(drawn)) > 1


def test_gradient_flow_scores_are_the_derivative_of_the_gradients_norm():
    """By finite differences: shrinking a branch by eps changes |g|^2 by 2 eps times the score."""
    torch.manual_seed(0)
    layers = [GatedResidual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.arange(16) % 3
    sections = find_sections(model, x)

    def norm():
        loss = F.cross_entropy(model(x), y)
        return sum(g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters())))

    scores = selection.gradient_flow_scores(model, sections, x, y)
    for section, score in zip(sections, scores, strict=True):
        values = []
        for factor in (1 - 1e-5, (1 + 1e-5) / (1 - 1e-5), 1 / (1 + 1e-5)):
            with torch.no_grad():
                for parameter in section.branch_parameters():
                    parameter.mul_(factor)
            values.append(float(norm()))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(2 * score, rel=1e-5)


def test_fixed_gates_keep_what_linear_decay_says():
    model = nn.Sequential(*(GatedResidual(nn.Linear(1, 1)) for _ in range(4)))
    sections = find_sections(model, torch.ones(2, 1))
    gates = FixedGates(sections, seed=0)
    counts = torch.tensor([gates.draw(64) for _ in range(50)], dtype=torch.float64)
    # Systematic: the number of rows is the probability's share, but for rounding.
    assert counts.mean(0).tolist() == pytest.approx([56, 48, 40, 32])
    drawn = gates.gates[3].draw
    assert set(drawn.gate.tolist()) == {0.0, 2.0}  # divided by its probability of 1/2


def test_hard_concrete_gates_are_open_as_often_as_their_penalty_says():
    """P(gate > 0) in the formula of the penalty, against 200,000 draws (five standard errors)."""
    model = nn.Sequential(*(GatedResidual(nn.Linear(1, 1)) for _ in range(3)))
    sections = find_sections(model, torch.ones(2, 1))
    gates = HardConcreteGates(sections, torch.full((3,), 0.1), 0, torch.device("cpu"))
    with torch.no_grad():
        gates.location.copy_(torch.tensor([-2.0, 0.0, 1.5]))
    expected = torch.sigmoid(gates.location.detach() - gates.bias)
    rows = 200_000
    found = torch.tensor(gates.draw(rows)) / rows
    assert ((found - expected).abs() < 5 * (0.25 / rows) ** 0.5).all()
    for section, gate in zip(sections, gates.gates, strict=True):
        x = torch.randn(rows, 1)
        y = section.module.train()(x)
        assert torch.allclose(y, x + gate.draw.gate[:, None] * section.module.branch(x), atol=1e-6)
    before = gates.location.detach().clone()
    gates.step(0.0)
    assert (gates.location < before).all()  # without a loss the penalty pulls all down


def test_a_gate_is_put_into_a_branch():
    torch.manual_seed(0)
    sections = [
        GatedResidual(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))),
        GatedResidual(nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
    ]
    x = torch.randn(5, 3)
    for section in sections:
        expected = 0.25 * section.branch(x)
        with torch.no_grad():
            scale(scaled_layer(section), 0.25)
        assert torch.allclose(section.branch(x), expected)
    with pytest.raises(TypeError, match="Tanh"):
        scaled_layer(GatedResidual(nn.Sequential(nn.Linear(3, 3), nn.Tanh())))
    block = models.build("resnet18", image_size=32).layer1[0]
    with pytest.raises(TypeError, match="BasicBlock"):
        scaled_layer(block)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_initialisation_does_not_depend_on_the_layout_of_memory(scheme):
    drawn = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(3, 5)).to(memory_format=layout)
        before = [layer.weight.clone() for layer in model]
        torch.manual_seed(0)
        initialise(model, scheme)
        assert all(not torch.equal(a, layer.weight) for a, layer in zip(before, model, strict=True))
        drawn.append([layer.weight.detach() for layer in model])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    if scheme == "orthogonal":
        matrix = drawn[0][1]  # of more rows than columns, which are orthonormal
        assert torch.allclose(matrix.T @ matrix, torch.eye(3), atol=1e-5)


def test_every_section_is_put_in_once(setup, monkeypatch):
    recipe, splits, device = setup[0].recipe, setup[0].splits, setup[0].device
    trained = plain_network(recipe, splits, device, REFERENCE["kept"])[0].model
    dense = plain_network(recipe, splits, device, {f"block{s}_{n}" for s in "123" for n in "123"})
    names = [section.name for section in find_sections(dense[0].model, dense[1])]
    result = {"kept": REFERENCE["kept"], "penalties": dict.fromkeys(names, 0.1)}
    monkeypatch.setattr(reinsertion, "run", lambda *_: (result, trained))
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    found = reinsertion.reinserted(*setup)["reinserted"]
    assert list(found) == names and len(names) == 9
    assert [name for name in names if found[name]["kept"]] == REFERENCE["kept"]
    for one in found.values():
        assert math.isfinite(one["difference"]) and one["error"] > 0 and one["penalty"] == 0.1
    assert len({one["difference"] for one in found.values()}) == 9
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())


def test_networks_are_timed_by_turns(monkeypatch):
    clock, turns = [0.0], []

    class Takes(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            assert not self.training
            turns.append(self.seconds)
            clock[0] += self.seconds
            return x

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    found = latency.inference_seconds({"a": Takes(1.0), "b": Takes(3.0)}, torch.zeros(1))
    assert found == {"a": 1.0, "b": 3.0}
    assert turns == [1.0, 3.0] * 17  # two of them not counted


def test_differences_are_those_of_removed_sections(setup):
    """Against networks from which the section was really removed."""
    torch.manual_seed(0)
    build = lambda: models.build("resnet20", width=2, in_channels=1, image_size=8)  # noqa: E731
    model, example = build(), torch.zeros(2, 1, 8, 8)
    loss, found = section_differences(model, example, setup[1], torch.device("cpu"))
    x, y = setup[1].batch(range(100))
    assert loss == pytest.approx(float(F.cross_entropy(model.eval()(x), y)), abs=1e-6)
    for name in ("block1_2", "block3_1"):
        other = build()
        other.load_state_dict(model.state_dict())
        from layerprune.compaction import eliminate_sections

        eliminate_sections(other, [name], example)
        with torch.no_grad():
            losses = [
                F.cross_entropy(net.eval()(x), y, reduction="none").double()
                for net in (model, other)
            ]
        difference = losses[0] - losses[1]
        assert found[name] == pytest.approx(
            [float(difference.mean()), float(difference.std()) / 10], abs=1e-6
        )


def written(tmp_path, **changes):
    path = tmp_path / "own.yaml"
    study = {
        "seeds": [0],
        "methods": ["dense", "ours", "scratch"],
        "equal_flops": ["scratch"],
        "tasks": {"tiny": {"held_out": 100, "recipe": SMALL}},
        "variations": {"tiny": {"xavier": {"init": "xavier"}}},
    }
    path.write_text(yaml.safe_dump(study | changes))
    return str(path)


def test_the_studies_that_are_shipped():
    for path in grid.FOLDER.glob("*.yaml"):
        study = grid.load(path.stem)
        cells = with_needs(study.cells())
        assert len(cells) == len({cell.file for cell in cells}) >= 30
        for place, cell in enumerate(cells):
            assert all(needed in cells[:place] for needed in cell.needs())


def test_the_defaults_are_tried_on_the_small_studys_tasks():
    small, defaults = grid.load("small"), grid.load("defaults")
    for name, task in defaults.tasks.items():
        assert (task.recipe, task.held_out) == (
            small.tasks[name].recipe,
            small.tasks[name].held_out,
        )


def test_a_task_may_have_methods_and_seeds_of_its_own(tmp_path):
    tasks = {
        "tiny": {"held_out": 100, "recipe": SMALL},
        "own": {
            "held_out": 100,
            "recipe": SMALL,
            "seeds": [0, 1],
            "methods": ["ours", "l0"],
            "equal_flops": ["l0"],
        },
    }
    variations = {"own": {"xavier": {"init": "xavier"}}}
    study = grid.load(written(tmp_path, tasks=tasks, variations=variations))
    assert [str(cell) for cell in study.cells() if cell.task == "own"] == [
        "own, ours, seed 0",
        "own, l0, seed 0",
        "own, l0 at equal operations, seed 0",
        "own, ours, seed 1",
        "own, l0, seed 1",
        "own, l0 at equal operations, seed 1",
        "own, ours (xavier), seed 0",  # the study's seeds
    ]
    assert {cell.method for cell in study.cells() if cell.task == "tiny"} == {
        "dense",
        "ours",
        "scratch",
    }
    with pytest.raises(StudyError, match="unknown method sgd"):
        tasks["own"]["methods"] = ["sgd"]
        grid.load(written(tmp_path, tasks=tasks))


def test_parts_of_a_study(tmp_path):
    path = written(tmp_path)
    study = grid.load(path, methods=["scratch"], seeds=[7])
    cells = with_needs(study.cells())
    assert cells[:2] == [Cell("tiny", "ours", seed=7), Cell("tiny", "scratch", seed=7)]
    assert (
        grid.load("small", datasets={"fashion-mnist": "mnist"})
        .tasks["fashion-mlp12"]
        .recipe.dataset
        == "mnist"
    )
    for given, words in (
        ({"tasks": ["nope"]}, "no task nope.*tiny"),
        ({"methods": ["nope"]}, "no method nope"),
    ):
        with pytest.raises(StudyError, match=words):
            grid.load(path, **given)
    with pytest.raises(StudyError, match="no such study: nope"):
        grid.load("nope")
    with pytest.raises(StudyError, match="unknown method sgd"):
        grid.load(written(tmp_path, methods=["sgd"]))
    with pytest.raises(StudyError, match="unknown init best"):
        grid.load(written(tmp_path, variations={"tiny": {"x": {"init": "best"}}}))


TASK = {"held_out": 100, "recipe": SMALL}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"equal_flop": ["l0"]}, "unknown equal_flop"),
        ({"equal_flops": ["l0"]}, "equal_flops are methods of it"),
        ({"seeds": []}, "seeds is a list of at least one number"),
        ({"seeds": 3}, "seeds is a list"),
        ({"tasks": ["tiny"]}, "tasks is a mapping"),
        ({"tasks": {"tiny": {"recipe": SMALL}}}, "task tiny lacks held_out"),
        ({"tasks": {"tiny": TASK | {"seed": 1}}}, "task tiny: unknown seed"),
        ({"tasks": {"tiny": TASK | {"held_out": 1}}}, "held_out is a number of images"),
        ({"variations": {"big": {}}}, "variations of unknown tasks: big"),
        ({"reinsertions": ["big"]}, "reinsertions of unknown tasks: big"),
        (
            {"methods": ["l0"], "equal_flops": [], "variations": {}}
            | {"tasks": {"tiny": TASK | {"recipe": SMALL | {"grad_accum_steps": 2}}}},
            "goes without grad_accum_steps",
        ),
    ],
)
def test_a_study_is_refused_for_what_nobody_would_read(tmp_path, changes, words):
    with pytest.raises(StudyError, match=words):
        grid.load(written(tmp_path, **changes))


def test_a_data_set_is_replaced_where_there_is_one(tmp_path):
    with pytest.raises(StudyError, match="no task on cifar10"):
        grid.load(written(tmp_path), datasets={"cifar10": "mnist"})


def test_what_a_cell_takes_from_another_belongs_to_its_settings(tmp_path):
    job = Job(grid.load(written(tmp_path)), None, tmp_path, "cpu", 1, FACTS)
    ours, scratch = Cell("tiny", "ours"), Cell("tiny", "scratch")

    def write(cell, **result):
        path = job.folder / cell.file
        path.write_text(json.dumps({"settings": job.settings(cell)} | result))

    write(ours, kept=["block1_1"], train_flops=0.5)
    write(scratch, kept=["block1_1"], train_flops=0.3)
    assert job.result(scratch)["train_flops"] == 0.3
    write(ours, kept=["block1_2"], train_flops=0.5)
    assert job.result(scratch) is None


def test_a_part_does_not_replace_the_whole(tmp_path):
    path = tmp_path / "study.json"
    training.check_output(path, 2)
    path.write_text(json.dumps({"rows": [{}, {}, {}]}))
    training.check_output(path, 3)
    with pytest.raises(StudyError, match="holds 3 runs, and these are 2"):
        training.check_output(path, 2)


@pytest.mark.slow
def test_a_study_goes_on_with_what_is_missing(tmp_path):
    job = Job(grid.load(written(tmp_path)), None, tmp_path / "work", "cpu", 1, FACTS)
    told = []
    assert run_all(job, 2, told.append) == [] and len(told) == 5
    result = collected(job)
    assert {row["method"] for row in result["rows"]} == {"dense", "ours", "scratch"}
    json.dumps(result)
    (job.folder / Cell("tiny", "dense").file).unlink()
    told.clear()
    assert run_all(job, 1, told.append) == [] and len(told) == 1
    # Other settings: what was run with the old ones does not count.
    changed = grid.load(written(tmp_path, tasks={"tiny": {"held_out": 90, "recipe": SMALL}}))
    assert all(replace(job, study=changed).result(cell) is None for cell in changed.cells())


def test_a_cell_that_fails_is_told_and_hinders_no_other(tmp_path):
    tasks = {
        "bad": {"held_out": 100, "recipe": SMALL | {"dataset": "fashion-mnist"}},
        "tiny": {"held_out": 100, "recipe": SMALL},
    }
    study = grid.load(
        written(tmp_path, tasks=tasks, methods=["dense"], equal_flops=[], variations={})
    )
    told = []
    failed = run_all(Job(study, None, tmp_path, "cpu", 1, FACTS), 1, told.append)
    assert failed == [Cell("bad", "dense")] and len(told) == 2
    assert "needs the folder that holds it" in told[0]
