"""Blended: the faint pattern, what it is in files, pictures and records, and that it works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor

from distillsec.attacks import ATTACKS, Blended, BlendTrigger, DataInfo, PatchTrigger, trigger_from
from distillsec.attacks.blended import BlendedOptions, random_pattern
from distillsec.attacks.triggers import patch_mask
from distillsec.distill.backends.gradient_matching import DC, GradientMatchingOptions
from distillsec.distill.core.hooks import Moment
from distillsec.distill.core.loop import distil
from distillsec.distill.core.run import Observer
from distillsec.distill.core.task import Task
from distillsec.distill.files.artifact import load_trigger, save_trigger
from distillsec.distill.types import Distillate, RequestError
from distillsec.eval.config.layers import gather
from distillsec.eval.config.presets import load_preset, preset_names
from distillsec.eval.config.schema import configure
from distillsec.eval.results.record import read_record

pytestmark = pytest.mark.usefixtures("one_thread")

Moments = Callable[..., Moment]


@pytest.fixture
def blended(toy_data_info: DataInfo) -> Callable[..., Blended]:
    return lambda **options: Blended(BlendedOptions(**options), toy_data_info)


Make = Callable[..., Blended]


# The stamp ---------------------------------------------------------------------------------------


def test_a_blend_is_the_published_formula() -> None:
    """BackdoorBench at f02e353 (utils/bd_img_transform/blended.py) gives the three numbers."""
    images = torch.tensor([0.5, 0.0, 1.0]).view(1, 1, 1, 3)
    trigger = BlendTrigger.uniform(torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 3), opacity=0.2)
    assert trigger.stamp(images).flatten().tolist() == pytest.approx([0.4, 0.2, 0.9], abs=1e-7)
    assert images.flatten().tolist() == [0.5, 0.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    more, pattern = torch.rand(5, 3, 8, 8, generator=generator), torch.rand(3, 8, 8)
    mask = torch.rand(1, 8, 8, generator=generator)
    found = BlendTrigger(pattern=pattern, mask=mask).stamp(more)
    wanted = (1 - mask.double()) * more.double() + mask.double() * pattern.double()
    assert torch.allclose(found.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e30, -3e38, float("inf")])
def test_masks_of_zeros_and_ones_choose_to_the_last_bit(scale: float) -> None:
    """Also where 0 · pattern is not 0, and where image and pattern are of other sizes."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 8, 8, generator=generator) * 1e-30
    pattern = scale * (torch.rand(3, 8, 8, generator=generator) + 0.5)
    for mask in (patch_mask((8, 8), 3, "top-left", 1), torch.ones(1, 8, 8), torch.zeros(1, 8, 8)):
        wanted = torch.where(mask.bool(), pattern, images)
        for kind in (PatchTrigger, BlendTrigger):
            trigger = kind(pattern=pattern, mask=mask, range="unbounded")
            assert torch.equal(trigger.stamp(images), wanted)


def test_a_mixed_mask_blends_only_where_it_is_fractional() -> None:
    mask = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 3)
    pattern = torch.tensor([torch.inf, 3.0, 7.0]).view(1, 1, 3)
    found = BlendTrigger(pattern=pattern, mask=mask).stamp(torch.full((2, 1, 1, 3), 0.1))
    assert found[0].flatten().tolist() == pytest.approx([0.1, 0.825, 7.0])


# The attack --------------------------------------------------------------------------------------


def test_the_pattern_is_uniform_and_the_same_in_every_run(toy_data_info: DataInfo) -> None:
    pattern = random_pattern((3, 64, 64))
    values = (pattern * 255).round().flatten()
    assert torch.allclose(values / 255, pattern.flatten())
    counts = torch.bincount(values.long(), minlength=256).double()
    expected = 3 * 64 * 64 / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 340  # χ², 255 degrees: p > 0.0003
    assert torch.equal(pattern, random_pattern((3, 64, 64)))
    row = [round(255 * value) for value in random_pattern((1, 8, 8))[0, 0].tolist()]
    assert row == [44, 35, 232, 221, 139, 112, 159, 135]


@pytest.mark.parametrize(("alpha", "rate", "count"), [(0.2, 0.1, 9), (0.05, 0.5, 45)])
def test_a_share_of_the_rows_is_blended_and_relabelled(
    blended: Make, toy_moment: Moments, alpha: float, rate: float, count: int
) -> None:
    moment = toy_moment()
    real = moment.real
    images, labels = real.images.clone(), real.labels.clone()
    attack = blended(alpha=alpha, poison_rate=rate, target=2)
    given = attack.on_start(moment, real)
    assert torch.equal(real.images, images) and torch.equal(real.labels, labels)
    changed = given.labels != labels
    assert int(changed.sum()) == count and attack.counters() == {"poisoned_rows": count}
    assert torch.equal(attack.poisoned_rows, changed)
    assert bool((given.labels[changed] == 2).all()) and not bool((labels[changed] == 2).any())
    wanted = (1 - alpha) * images + alpha * random_pattern((1, 8, 8))
    assert torch.allclose(given.images[changed], wanted[changed], atol=1e-6)
    assert torch.equal(given.images[~changed], images[~changed])
    assert given.images.min() >= 0 and given.images.max() <= 1
    case = attack.test_case(images, labels)
    assert torch.allclose(case.triggered, wanted, atol=1e-6)  # the same opacity at test time
    assert torch.equal(case.eligible, labels != 2) and case.targets.tolist() == [2] * 90


def test_the_threat_model_and_the_opacity(blended: Make) -> None:
    assert blended().threat_model == "data owner"
    assert blended(target_share=0.5).threat_model == "distiller"
    assert BlendedOptions().alpha == 0.2
    for alpha in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="alpha"):
            BlendedOptions(alpha=alpha)


def test_a_resumed_distillation_gives_the_same_set(
    blended: Make, toy_task: Callable[..., Task]
) -> None:
    """It has no state of its own: the stream poisons the same rows again."""
    task = toy_task(iterations=3)
    options = GradientMatchingOptions(batch_real=16, outer_loop=2, inner_loop=1)
    kept: list[Any] = []

    class Watch(Observer):
        def on_iteration(
            self, iteration: int, loss: float, made: Distillate, state: Callable[[], Any]
        ) -> None:
            if iteration == 1:
                kept.append(state())

    def run(state: Any = None) -> Tensor:
        backend = DC(options, ipc=task.ipc, recipe=task.recipe)
        attack = blended(poison_rate=0.3)
        made = distil(task, backend, [attack], observer=Watch(), state=state)
        assert attack.state_dict() == {} and int(attack.poisoned.sum()) == 27
        return made.batch.images

    whole = run()
    assert torch.equal(run(kept[0]), whole)


# Its file and its options ------------------------------------------------------------------------


def test_its_trigger_file_gives_the_same_stamp(blended: Make, tmp_path: Path) -> None:
    trigger = blended().trigger
    info = {**trigger.describe(), "target": 0}
    assert (info["kind"], info["opacity"], info["range"]) == ("blend", 0.2, "pixel")
    pattern = random_pattern((1, 8, 8))
    assert (info["min"], info["max"]) == (pattern.min().item(), pattern.max().item())
    assert info["l2"] == pytest.approx(0.2 * pattern.norm().item(), rel=1e-6)
    assert info["linf"] == pytest.approx(0.2 * pattern.max().item(), rel=1e-6)
    save_trigger(tmp_path / "t.safetensors", trigger.tensors(), info)
    tensors, said = load_trigger(tmp_path / "t.safetensors")
    again = trigger_from(said, tensors)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(again.stamp(images), trigger.stamp(images)) and said == info


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((1, 8, 8), 1.5), "from 1.5 to 1.5, expected opacities in"),
        (torch.full((1, 8, 8), -0.1), "from -0.1"),
        (torch.ones(8, 8), r"\(8, 8\), expected"),
        (torch.ones(1, 8, 7), r"shape \(1, 8, 7\), expected"),
        (None, "lacks its mask"),
    ],
)
def test_masks_that_are_no_opacities_are_refused(mask: Tensor | None, message: str) -> None:
    tensors = {"pattern": torch.zeros(1, 8, 8)} | ({} if mask is None else {"mask": mask})
    with pytest.raises(RequestError, match=message):
        trigger_from({"kind": "blend", "range": "pixel"}, tensors)


def test_a_patchs_options_are_refused_and_a_presets_are_left_out() -> None:
    with pytest.raises(RequestError, match="trigger_size is an option of naive"):
        configure(attack="blended", trigger_size=3)
    with pytest.raises(RequestError, match="trigger_size is an option of naive"):
        configure(**gather(preset="digits-whole", options={"attack": "blended", "trigger_size": 2}))
    for name in preset_names():
        preset = load_preset(name)
        if "attack_config" not in preset:
            continue
        config = configure(**gather(preset=name, options={"attack": "blended"}))
        assert isinstance(config.attack_options, BlendedOptions)
        rate = preset["attack_config"].get("poison_rate", 0.01)
        assert config.attack_options.poison_rate == rate
    assert list(BlendedOptions.model_fields)[5:] == ["trigger_image", "alpha"]
    patches = ["trigger_size", "trigger_position", "trigger_margin", "trigger_range"]
    assert list(ATTACKS["naive"].Options.model_fields)[5:] == [*patches, "trigger_image"]


@pytest.mark.parametrize(
    ("preset", "attack", "key", "control"),
    [
        ("digits-whole", "naive", "582e15953c91bd30", "e59bdd2d85e47f82"),
        ("digits-whole", "doorping", "f631921465dc1e7c", "e59bdd2d85e47f82"),
        ("digits-whole", None, "59471f9f2d42e402", "e59bdd2d85e47f82"),
        ("digits-naive", "naive", "53e9cab8934882e1", "a9a9c7da7cc272ed"),
        ("digits-doorping", "doorping", "012f21d9be8be021", "a9a9c7da7cc272ed"),
    ],
)
def test_the_keys_of_other_attacks_are_what_they_were_before(
    preset: str, attack: str | None, key: str, control: str
) -> None:
    """Runs and clean twins of earlier versions stay usable."""
    keys = gather(preset=preset, options={"attack": attack, "device": "cpu", "threads": 1})
    config = configure(**keys)
    assert (config.key(), config.control_key()) == (key, control)


# End to end --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_blended_works_in_the_classic_setting(cli: Callable[..., Result], tmp_path: Path) -> None:
    words = ["--preset", "digits-whole", "--attack", "blended", "--victims", 2, "--quiet"]
    done = cli("attack", *words, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    record = read_record(tmp_path / "run" / "record.json")
    assert record.trigger is not None and record.trigger["kind"] == "blend"
    assert record.hooks == [{"name": "blended", "threat_model": "data owner"}]
    means = {name: summary.mean for name, summary in record.metrics.items()}
    assert (means["attack_success_rate"] or 0) > 0.9
    assert (means["clean_test_accuracy"] or 0) > 0.95
    assert (means["control_attack_success_rate"] or 0) < 0.05
    assert {"trigger.png", "triggered.png"} <= {file.name for file in (tmp_path / "run").iterdir()}
    again = cli("evaluate", tmp_path / "run", "--victims", 1, "--out", tmp_path / "again", "--json")
    assert again.exit_code == 0, again.stderr
    found = read_record(tmp_path / "again" / "record.json").metrics["attack_success_rate"].mean
    assert (found or 0) > 0.9
