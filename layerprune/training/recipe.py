"""Recipes: everything that decides how a run goes, from YAML or by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from layerprune.training.settings import Recipe, RecipeError
from layerprune.training.typed import coerced
from layerprune.training.untrusted import YAML_LIMIT, parsed_yaml, read_text

__all__ = ["DEFAULT", "Recipe", "RecipeError", "from_mapping", "load", "names", "override"]

DEFAULT = "digits-resnet32"
"""The recipe that needs no download."""


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if _is_recipe(entry.name))


def load(name: str) -> Recipe:
    """Reads a recipe.

    Args:
        name: one of `names()`, or the path of a YAML file (it ends in .yaml or .yml, or holds a
            slash). A file without ``name`` is named after itself.

    Raises:
        RecipeError: no such recipe, or it holds something it may not.
    """
    if _is_recipe(name) or "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"no such recipe file: {path}")
        try:
            text, what = read_text(path, YAML_LIMIT), str(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe file {path} cannot be read: {error}") from error
    elif name in names():
        text, what = _folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name
    else:
        raise RecipeError(
            f"unknown recipe {name!r}; the recipes are {', '.join(names())} "
            "(or give the path of a .yaml file)"
        )
    try:
        values = parsed_yaml(text)
    except ValueError as error:
        raise RecipeError(f"recipe {what} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {what} must be a mapping of settings")
    return from_mapping({"name": Path(what).stem if _is_recipe(what) else what} | values, what)


def from_mapping(values: Mapping[str, Any], what: str) -> Recipe:
    """Makes a recipe of plain values.

    Args:
        values: by setting.
        what: where they come from, for the message.

    Raises:
        RecipeError: an unknown or missing setting, a wrong type, a value out of its range.
    """
    needed = ("name", "dataset", "model", "epochs", "batch_size", "lr")
    missing = [name for name in needed if name not in values]
    if missing:
        raise RecipeError(f"recipe {what} lacks {', '.join(missing)}")
    try:
        return Recipe(**coerced(Recipe, values, f"recipe {what}"))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def override(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with some settings replaced; those given as None stay.

    Raises:
        RecipeError: as `from_mapping`.
    """
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return replace(recipe, **coerced(Recipe, given, f"recipe {recipe.name}"))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _folder() -> Any:
    return resources.files("layerprune").joinpath("recipes")


def _is_recipe(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))
