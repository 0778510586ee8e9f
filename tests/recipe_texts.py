"""Recipes for tests, and what is said about them."""

import re
from pathlib import Path

import pytest

from truetune.recipe import Recipe, RecipeError, load_recipe

BASE = {"model": "m", "data": "chats.jsonl"}


def load(*overrides, **flags) -> Recipe:
    return load_recipe(None, overrides, BASE | flags)


def load_written(directory: Path, text: str, *overrides, **flags) -> Recipe:
    """Writes a recipe, with model and data unless they are there, and loads it."""
    path = directory / "recipe.yaml"
    head = "".join(f"{key}: {value}\n" for key, value in BASE.items() if not re.search(f"^{key}:", text, re.M))
    path.write_text(head + text, encoding="utf-8")
    return load_recipe(str(path), overrides, flags)


def error_of(action, *args, **kwargs) -> str:
    with pytest.raises(RecipeError) as caught:
        action(*args, **kwargs)
    return str(caught.value)
