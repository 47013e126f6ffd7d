"""The victims' recipe, and what the configuration overrides in a set's own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...distill.preprocessing import Preprocessing
from ...distill.types import Recipe, RequestError
from ..config.schema import VictimSection

_FIELDS = {"victim_epochs": "epochs", "victim_lr": "lr", "victim_augment": "augment"}


def victims_recipe(victims: VictimSection, preprocessing: Preprocessing) -> Recipe:
    """How victims train before a backend has learned anything.

    What the configuration leaves to the backend has the default of ``Recipe`` until then.
    """
    if victims.victim_augment is None:
        raise RequestError("the victims' recipe is not resolved: use configure()")
    return Recipe(preprocessing=preprocessing, **_settings(victims, _FIELDS))


def override(recipe: Recipe, victims: VictimSection) -> Recipe:
    """A learned ``recipe`` with the epochs, rate and augmentation of ``victims``.

    Where ``victims`` has neither epochs nor a rate, the backend learns them: the recipe stays.
    """
    if victims.victim_epochs is None and victims.victim_lr is None:
        return recipe
    return override_given(recipe, victims, _FIELDS)


def override_given(recipe: Recipe, victims: VictimSection, given: Collection[str]) -> Recipe:
    """``recipe`` with those settings of ``victims`` whose keys are in ``given``.

    Any override means training by epochs, in place of learned steps.
    """
    settings = _settings(victims, given)
    return recipe.by_epochs(**settings) if settings else recipe


def _settings(victims: VictimSection, keys: Collection[str]) -> dict[str, Any]:
    """Fields of a recipe that ``keys`` of ``victims`` set; ``None`` sets nothing."""
    found = {field: getattr(victims, key) for key, field in _FIELDS.items() if key in keys}
    return {field: value for field, value in found.items() if value is not None}
