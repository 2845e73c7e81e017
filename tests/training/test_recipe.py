import dataclasses

import pytest
import yaml

from layerprune.config import PruneConfig
from layerprune.training import recipe
from layerprune.training.recipe import Recipe, RecipeError

MINIMAL = {
    "name": "x",
    "dataset": "digits",
    "model": "resnet20",
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.1,
}


def made(**values) -> Recipe:
    return recipe.from_mapping(MINIMAL | values, "x")


@pytest.mark.parametrize("name", recipe.names())
def test_every_packaged_recipe_loads_under_its_name(name):
    assert recipe.load(name).name == name


def test_the_default_recipe_needs_no_download():
    assert recipe.load(recipe.DEFAULT).dataset == "digits"


def test_a_recipe_survives_yaml():
    one = made(decay_milestones=[1, 1.5], prune_config={"looks": 3, "max_descending": None})
    text = yaml.safe_dump(one.as_dict())
    assert recipe.from_mapping(yaml.safe_load(text), "x") == one


def test_numbers_as_people_write_them():
    one = made(lr=1, weight_decay="1e-4", prune_config={"horizon": "5e-2"})
    assert (one.lr, one.weight_decay, one.pruning().horizon) == (1.0, 1e-4, 0.05)
    assert isinstance(one.lr, float)


def test_prune_config_reaches_every_field():
    defaults = dataclasses.asdict(PruneConfig())
    assert made(prune_config=defaults).pruning() == PruneConfig()


def test_a_file_is_named_after_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "name"}))
    assert recipe.load(str(path)).name == "mine"


def test_override_leaves_what_is_none():
    changed = recipe.override(made(seed=3), epochs=5, seed=None)
    assert (changed.epochs, changed.seed) == (5, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset": "nope"}, ["nope", "digits", "cifar10"]),
        ({"model": "nope"}, ["nope", "resnet32"]),
        ({"learning_rate": 1}, ["learning_rate", "lr"]),
        ({"epochs": "many"}, ["epochs", "whole number", "many"]),
        ({"epochs": 2.5}, ["epochs", "whole number", "2.5"]),
        ({"epochs": True}, ["epochs", "whole number", "True"]),
        ({"epochs": 0}, ["epochs", "at least 1"]),
        ({"lr": "fast"}, ["lr", "a number", "fast"]),
        ({"lr": float("nan")}, ["lr", "above 0"]),
        ({"lr": 0}, ["lr", "above 0"]),
        ({"weight_decay": -1}, ["weight_decay", "at least 0"]),
        ({"opt": "lbfgs"}, ["opt", "sgd, adam, adamw", "lbfgs"]),
        ({"prune": "yes"}, ["prune", "true or false"]),
        ({"strength": 0}, ["strength", "above 0"]),
        ({"seed": -1}, ["seed", "at least 0"]),
        ({"smoothing": 1}, ["smoothing", "[0, 1)"]),
        ({"grad_accum_steps": 0}, ["grad_accum_steps", "at least 1"]),
        ({"clip_grad": 0}, ["clip_grad", "above 0"]),
        ({"amp_dtype": "float64"}, ["amp_dtype", "bfloat16, float16", "float64"]),
        ({"model_ema_decay": 1}, ["model_ema_decay", "[0, 1)"]),
        ({"checkpoint_steps": 0}, ["checkpoint_steps", "at least 1"]),
        ({"warmup_epochs": 3}, ["warmup_epochs", "at most epochs"]),
        ({"decay_milestones": ["a"]}, ["decay_milestones", "list"]),
        ({"train_subset": 4}, ["train_subset", "batch_size"]),
        ({"nesterov": True, "momentum": 0}, ["nesterov", "momentum"]),
        ({"model_args": {"num_classes": 3}}, ["num_classes", "data"]),
        ({"model_args": [1]}, ["model_args", "mapping"]),
        ({"prune_config": {"horizont": 1}}, ["horizont", "horizon"]),
        ({"prune_config": {"looks": 1.5}}, ["looks", "whole number"]),
        ({"prune_config": {"level": 2}}, ["level", "[0, 1]"]),
        ({"prune_config": {"rule": "none"}}, ["rule", "attraction"]),
        ({"prune_config": {"min_rows": 9}}, ["batch_size", "min_rows"]),
        ({"without": ["block1_1"]}, ["without", "prune: false"]),
    ],
)
def test_what_is_refused(values, words):
    with pytest.raises(RecipeError) as refused:
        made(**values)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_missing_setting_is_named():
    with pytest.raises(RecipeError, match="lacks dataset, epochs"):
        recipe.from_mapping(
            {k: v for k, v in MINIMAL.items() if k not in ("dataset", "epochs")}, "x"
        )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("nope", None, "digits-resnet32"),
        ("missing.yaml", None, "no such recipe file"),
        ("broken.yaml", "a: [1", "no YAML"),
        ("list.yaml", "- 1", "mapping"),
    ],
)
def test_what_is_no_recipe(tmp_path, monkeypatch, name, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=words) as refused:
        recipe.load(name)
    assert "\n" not in str(refused.value)
