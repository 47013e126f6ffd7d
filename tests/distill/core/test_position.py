"""Where a run is: steps counted over the run, and attack keys that never repeat."""

from __future__ import annotations

import torch

from distillsec.distill.core.position import Position
from distillsec.distill.randomness import Streams


def test_steps_are_counted_over_the_run() -> None:
    position = Position(Streams(0), iterations=3, steps_per_iteration=2)
    seen = []
    for iteration in range(3):
        for step in range(2):
            position.enter(iteration, step)
            seen.append((position.step, position.progress, position.is_last_step))
    assert seen == [(step, step / 6, step == 5) for step in range(6)]
    assert position.total_steps == 6


def test_experts_change_the_phase_and_no_step() -> None:
    position = Position(Streams(0), iterations=3, steps_per_iteration=2)
    position.enter(1, 1)
    position.enter_expert(0, 4, 2)
    assert (position.phase, position.iteration, position.step) == ("expert", 1, 3)
    position.enter(1)
    assert (position.phase, position.step) == ("distill", 2)


def test_a_stream_depends_on_the_step() -> None:
    position = Position(Streams(5), iterations=3, steps_per_iteration=2)
    position.enter(1)
    found = torch.rand(3, generator=position.generator("draw", 7))
    assert torch.equal(found, torch.rand(3, generator=Streams(5).generator("draw", 2, 7)))


def test_no_two_moments_share_an_attack_key() -> None:
    def keys() -> list[tuple[int, ...]]:
        position = Position(Streams(0), iterations=2, steps_per_iteration=1)
        found = [position.next_attack_key(event) for event in ("on_draw", "on_draw", "on_loss")]
        position.enter_expert(0, 0, 0)
        found.append(position.next_attack_key("on_draw"))
        position.enter(1)
        return [*found, position.next_attack_key("on_draw")]

    assert keys() == keys() and len(set(keys())) == 5
