"""Groups of tensors under a prefix."""

from __future__ import annotations

import torch

from distillsec.distill.files.prefixes import add_prefix, select_prefix


def test_a_group_comes_back_without_its_neighbours() -> None:
    tensors = {name: torch.tensor(value) for value, name in enumerate(("a", "b.c"))}
    both = add_prefix("hook.1", tensors) | add_prefix("hook.10", {"a": torch.tensor(9)})
    assert sorted(both) == ["hook.1.a", "hook.1.b.c", "hook.10.a"]
    assert select_prefix("hook.1", both) == tensors
    assert select_prefix("hook", both).keys() == {"1.a", "1.b.c", "10.a"}
    assert select_prefix("hook.2", both) == {}
