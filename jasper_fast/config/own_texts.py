"""Own texts on a shipped recipe: limits and evaluation sets of the recipe's texts do not apply to them."""

from __future__ import annotations

import copy
from typing import Any


def without_limits(recipe: dict[str, Any], tree: dict[str, Any], sets_given: bool) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe without what belongs to its own texts, if the configuration has other texts.

    Args:
        recipe: the recipe as plain values.
        tree: the recipe with the user's changes.
        sets_given: True if the user has set ``evaluate``. Then the recipe's sets are kept.

    Returns:
        the recipe, with batches that shrink for few texts, and the removed values as ``key value``. The recipe is
        unchanged and the list empty if all texts are the recipe's.
    """
    own, paths = _paths(recipe), _paths(tree)
    if not set(paths) - {*own, None}:
        return recipe, []
    recipe = copy.deepcopy(recipe)
    data = recipe["data"]
    removed = [f"data.{key} {data.pop(key)}" for key in ("limit", "held_out") if data.get(key) is not None]
    for index, (source, path) in enumerate(zip(recipe["data"]["sources"], paths, strict=False)):
        if path != source["path"]:  # another text source under the recipe's position
            limits = [f"data.sources.{index}.{key} {source.pop(key)}" for key in ("limit", "variants") if key in source]
            removed += limits
    for stage in recipe["stages"]:
        if (texts := stage.pop("texts", None)) is not None:
            removed.append(f"stages.{stage['name']}.texts {texts}")
        stage["small_data"] = "adapt"
    if not sets_given:
        gone = [one["path"] for one in recipe.get("evaluate", []) if one["path"] in own and one["path"] not in paths]
        recipe["evaluate"] = [one for one in recipe.get("evaluate", []) if one["path"] not in gone]
        removed += [f"evaluate {path}" for path in gone]
    return recipe, removed


def _paths(tree: dict[str, Any]) -> list[Any]:
    """Return the path of each text source, None where it is missing."""
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list):
        return []
    found = [source.get("path") if isinstance(source, dict) else None for source in sources]
    return [path if isinstance(path, str) else None for path in found]
