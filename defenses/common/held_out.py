"""The defender's clean held-out images: how many a defense needs, and what it uses without any."""

from __future__ import annotations

from ...distill.types import Batch
from ..base import DefenderView


def images_needed(view: DefenderView, least: int = 1) -> str | None:
    """Why a defense that needs ``least`` held-out images is not applicable, or ``None``."""
    found = len(view.holdout)
    if found >= least:
        return None
    if not found:
        return "needs held-out images, there are none"
    return f"needs {least} held-out images, there are {found}"


def few_images_caution(view: DefenderView, enough: int, use: str) -> str | None:
    """The caution of a defense that needs ``enough`` held-out images for its ``use`` of them."""
    found = len(view.holdout)
    return None if found >= enough else f"{use} {found} held-out images, needs {enough}"


def known_images(view: DefenderView) -> Batch:
    """The held-out images, or the received rows if there are none; those may be poisoned."""
    return view.holdout if len(view.holdout) else view.distilled.batch.replace(labels=view.labels)


def known_images_caution(view: DefenderView, enough: int = 100) -> str | None:
    """The caution of a defense that uses ``known_images`` and needs ``enough``."""
    found = len(view.holdout)
    if not found:
        return "no held-out images: uses the received rows, which may be poisoned"
    return None if found >= enough else f"uses {found} held-out images, needs {enough}"
