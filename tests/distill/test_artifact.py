"""Files of sets, triggers, tensors and JSON: exact round trips, and every fault as one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from distillsec.distill import artifact, files
from distillsec.distill.artifact import (
    export_png,
    import_pt,
    load_set,
    load_trigger,
    pixel_range,
    quantised,
    save_set,
    save_trigger,
)
from distillsec.distill.files import (
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from distillsec.distill.types import Batch, DistilledSet, Recipe, RequestError


def make_set(
    shape: tuple[int, int, int] = (3, 4, 5), count: int = 6, *, soft: bool = False, seed: int = 0
) -> DistilledSet:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    batch = Batch(
        images=torch.randn(count, *shape, generator=rng),
        labels=torch.randn(count, 3, generator=rng) if soft else labels,
    )
    recipe = Recipe(mean=(0.1,) * shape[0], std=(0.3,) * shape[0], lr=1 / 3, augment="color_crop")
    return DistilledSet(batch=batch, classes=("cat", "großer Hund", "a/b"), recipe=recipe)


def refused(path: Path, fault: str) -> pytest.RaisesExc[RequestError]:
    """Expects a RequestError of one line that names the file and the fault."""

    def one_line(error: RequestError) -> bool:
        text = str(error)
        return "\n" not in text and str(path) in text and fault in text

    return pytest.RaisesExc(RequestError, check=one_line)


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


# Atomic writes and JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_killed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def die(temporary: Path) -> None:
        temporary.write_text("half")
        raise error("died")

    with pytest.raises(RequestError if error is OSError else error):
        write_atomically(path, die)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_faults_of_the_disk_are_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "absent" / "file.json"
    with refused(absent, "No such file"):
        write_json(absent, {})
    with refused(absent, "cannot write"):
        write_tensors(absent, {"a": torch.ones(1)}, {})
    path = tmp_path / "file.json"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(path, "cannot write"):
        write_json(path, {})
    assert not list(tmp_path.iterdir())


def test_json_round_trip_and_faults(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    value = {"b": [1, 0.1, None], "a": {"ä": True}}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text().endswith("}\n")
    assert path.read_text().index('"b"') < path.read_text().index('"a"')
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == value
    for content, fault in [
        (b"", "is empty"),
        (b'{"a": [1, ', "truncated or not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b"\xff\xfe\x00", "truncated or not JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ]:
        path.write_bytes(content)
        with refused(path, fault):
            read_json(path)


def test_what_is_no_file_is_refused_unread(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for reader in (read_json, read_tensors, load_set, load_trigger):
        with refused(tmp_path / "absent", "no such file"):
            reader(tmp_path / "absent")
        with refused(tmp_path, "a folder"):
            reader(tmp_path)
        with refused(pipe, "a pipe"):
            reader(pipe)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(files.TENSORS_CAP + 1)  # sparse: no disk is filled
    for reader in (read_json, read_tensors):
        with refused(large, "too large"):
            reader(large)
    with refused(large, "too large"):
        import_pt(large, mean=[0], std=[1], classes=["a"])


# Tensors ------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
    dtype=st.sampled_from(DTYPES),
    info=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans()),
)
def test_tensors_round_trip(shapes: list[list[int]], dtype: torch.dtype, info: Any) -> None:
    tensors = {f"t{i}": (torch.randn(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        write_tensors(path, tensors, info)
        found, described = read_tensors(path)
    assert described == info
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((2, 3), i, dtype=DTYPES[i]) for i in range(6)}
    info = {"z": 1, "a": [1, 2]}
    write_tensors(tmp_path / "1", tensors, info)
    write_tensors(tmp_path / "2", dict(reversed(tensors.items())), dict(reversed(info.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert set(header_of(tmp_path / "1")["__metadata__"]) == {"distillsec"}
    reference = tmp_path / "reference"
    reference.touch()
    assert (tmp_path / "1").stat().st_mode == reference.stat().st_mode


def test_views_special_values_and_overwriting_round_trip(tmp_path: Path) -> None:
    base = torch.randn(4, 6, requires_grad=True)
    tensors = {
        "base": base,
        "transposed": base.t(),
        "part": base[1:3],
        "stretched": torch.ones(1).expand(5),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    path = tmp_path / "state"
    for _ in range(2):
        write_tensors(path, tensors, {})
    found, _ = read_tensors(path)
    write_tensors(path, {"other": torch.zeros(100)}, {})  # what was read does not live in the file
    for name, tensor in tensors.items():
        assert found[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes()


def test_every_truncation_and_flipped_header_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    good, path = tmp_path / "good", tmp_path / "bad"
    save_set(good, make_set((1, 2, 2), 3))
    content = good.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with refused(path, ": "):
            load_set(path)
    for position in range(0, len(content) - 72, 3):
        broken = bytearray(content)
        broken[position] ^= 0x15
        path.write_bytes(broken)
        try:
            load_set(path)  # a flip in a class name is a different, valid file
        except RequestError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({}, "no metadata under the key"),
        ({"distillsec": "{"}, "not JSON"),
        ({"distillsec": "[1]"}, "expected an object"),
        ({"distillsec": '{"a": Infinity}'}, "Infinity"),
    ],
)
def test_foreign_metadata_is_refused(tmp_path: Path, metadata: dict[str, str], fault: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata=metadata)
    with refused(path, fault):
        read_tensors(path)


# Distilled sets -----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    count=st.integers(1, 7),
    soft=st.booleans(),
)
def test_set_round_trip(shape: tuple[int, int, int], count: int, soft: bool) -> None:
    distilled = make_set(shape, count, soft=soft)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "distilled.safetensors"
        save_set(path, distilled)
        found = load_set(path)
    assert torch.equal(found.batch.images, distilled.batch.images)
    assert torch.equal(found.batch.labels, distilled.batch.labels)
    assert found.batch.labels.dtype == distilled.batch.labels.dtype
    assert (found.classes, found.recipe) == (distilled.classes, distilled.recipe)


def test_the_file_holds_a_fixed_set_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "distilled.safetensors"
    save_set(path, make_set())
    header = header_of(path)
    assert set(header) == {"images", "labels", "__metadata__"}
    info = json.loads(header["__metadata__"]["distillsec"])
    assert set(info) == {"format_version", "classes", "image_shape", "recipe"}
    assert set(info["recipe"]) == {field.name for field in dataclasses.fields(Recipe)}


IMAGES, LABELS = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
BAD_TENSORS: list[tuple[dict[str, Tensor], str]] = [
    ({"images": IMAGES}, "holds the tensors images;"),
    ({"images": IMAGES, "labels": LABELS, "trigger": IMAGES}, "images, labels, trigger;"),
    ({"images": IMAGES.double(), "labels": LABELS}, "torch.float64"),
    ({"images": IMAGES[0], "labels": LABELS}, "shape (1, 2, 2)"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "none 0"),
    ({"images": torch.zeros(2, 1, 1, 4097), "labels": LABELS}, "4096"),
    ({"images": torch.zeros(2, 1, 2, 3), "labels": LABELS}, "metadata says (1, 2, 2)"),
    ({"images": IMAGES / 0, "labels": LABELS}, "NaN"),
    ({"images": IMAGES + float("inf"), "labels": LABELS}, "infinite"),
    ({"images": IMAGES, "labels": LABELS[:1]}, "shape (1,), expected (2,)"),
    ({"images": IMAGES, "labels": LABELS.int()}, "torch.int32"),
    ({"images": IMAGES, "labels": LABELS + 1}, "run from 1 to 2, expected 0 to 1"),
    ({"images": IMAGES, "labels": LABELS - 1}, "run from -1 to 0"),
    ({"images": IMAGES, "labels": torch.zeros(2, 3)}, "expected (2, 2)"),
    ({"images": IMAGES, "labels": torch.zeros(2, 2) / 0}, "labels hold NaN"),
]


def info_with(**changes: Any) -> dict[str, Any]:
    recipe = {"mean": [0.5], "std": [0.2], "epochs": 3, "lr": 0.1, "momentum": 0.9}
    recipe |= {"weight_decay": 0.0, "batch_size": 2, "augment": ""}
    info = {"format_version": 1, "classes": ["a", "b"], "image_shape": [1, 2, 2]}
    recipe |= {key[2:]: changes.pop(key) for key in list(changes) if key.startswith("r_")}
    return info | {"recipe": recipe} | changes


@pytest.mark.parametrize(("tensors", "fault"), BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path: Path, tensors: dict[str, Tensor], fault: str) -> None:
    path = tmp_path / "distilled.safetensors"
    write_tensors(path, tensors, info_with())
    with refused(path, fault):
        load_set(path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"format_version": None}, "format_version is None"),
        ({"trigger": 1}, "metadata trigger"),
        ({"classes": []}, "metadata classes"),
        ({"classes": "ab"}, "metadata classes"),
        ({"classes": ["a", 3]}, "metadata classes.1"),
        ({"classes": ["a", "\x1b[2J"]}, "unprintable"),
        ({"classes": ["a", "x" * 201]}, "metadata classes.1"),
        ({"image_shape": [1, 2]}, "metadata image_shape"),
        ({"recipe": None}, "metadata recipe"),
        ({"r_mean": [0.5, 0.5]}, "mean has 2 numbers for 1 channels"),
        ({"r_std": [0.0]}, "metadata recipe.std.0"),
        ({"r_epochs": 0}, "metadata recipe.epochs"),
        ({"r_epochs": True}, "metadata recipe.epochs"),
        ({"r_epochs": 10**12}, "metadata recipe.epochs"),
        ({"r_lr": -1}, "metadata recipe.lr"),
        ({"r_lr": "0.1"}, "metadata recipe.lr"),
        ({"r_lr": 10**400}, "metadata recipe.lr"),
        ({"r_momentum": 1.5}, "metadata recipe.momentum"),
        ({"r_weight_decay": -1e-4}, "metadata recipe.weight_decay"),
        ({"r_augment": "../x"}, "metadata recipe.augment"),
        ({"r_extra": 1}, "metadata recipe.extra"),
    ],
)
def test_bad_metadata_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    path = tmp_path / "distilled.safetensors"
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info_with())
    assert load_set(path).classes == ("a", "b")
    write_tensors(path, {"images": IMAGES, "labels": LABELS}, info_with(**changes))
    with refused(path, fault):
        load_set(path)


def test_an_invalid_set_is_never_written(tmp_path: Path) -> None:
    distilled, path = make_set(), tmp_path / "distilled.safetensors"
    save_set(path, distilled)
    before = path.read_bytes()
    bad = distilled.batch.replace(images=distilled.batch.images * float("nan"))
    with refused(path, "NaN"):
        save_set(path, dataclasses.replace(distilled, batch=bad))
    assert path.read_bytes() == before


def test_triggers(tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    tensors = {"pattern": torch.rand(1, 4, 4), "mask": torch.ones(1, 4, 4)}
    info = {"kind": "patch", "target": 3, "range": "pixel", "size": 2}
    save_trigger(path, tensors, info)
    found, described = load_trigger(path)
    assert described == info
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with refused(path, "lacks target, range"):
        save_trigger(path, tensors, {"kind": "patch"})
    with refused(path, "pattern holds NaN"):
        save_trigger(path, {"pattern": torch.tensor([float("nan")])}, info)
    write_tensors(path, tensors, {})
    with refused(path, "lacks kind"):
        load_trigger(path)


# Other projects' files ----------------------------------------------------------------------------


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def published() -> dict[str, Any]:
    """The structure of DatasetCondensation's ``res_*.pt``."""
    rng = torch.Generator().manual_seed(0)
    data = [[torch.randn(4, 2, 3, 3, generator=rng), torch.arange(4)] for _ in range(2)]
    accuracies = [np.float64(0.5), np.float64(0.25), np.int64(3), np.float32(1)]
    return {"data": data, "accs_all_exps": {"ConvNet": accuracies, "MLP": []}}


@pytest.mark.parametrize("modern", [True, False])
def test_published_files_are_imported(tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "res_DC.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    mean, std, classes = (0.5, 0.4), (0.2, 0.3), ["a", "b", "c", "d"]
    sets = import_pt(path, mean=mean, std=std, classes=classes)
    assert len(sets) == 2
    for found, (images, labels) in zip(sets, published()["data"], strict=True):
        scale, shift = torch.tensor(std).view(2, 1, 1), torch.tensor(mean).view(2, 1, 1)
        torch.testing.assert_close(found.batch.images, images * scale + shift)
        assert torch.equal(found.batch.labels, labels)
        assert found.recipe == Recipe(mean=mean, std=std)
        assert found.classes == tuple(classes)
        save_set(tmp_path / "converted.safetensors", found)


def test_numpy_1_names_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(import_pt(path, mean=(0, 0), std=(1, 1), classes="abcd")) == 2


def test_pairs_and_soft_labels_are_read(tmp_path: Path) -> None:
    path, images = tmp_path / "x.pt", torch.rand(3, 1, 2, 2, dtype=torch.float64)
    for value in (
        [images, torch.zeros(3, dtype=torch.int32)],
        (torch.nn.Parameter(images), torch.zeros(3).long()),
        {"images": images, "labels": torch.rand(3, 2, dtype=torch.float64)},
    ):
        torch.save(value, path)
        (found,) = import_pt(path, mean=[0], std=[1], classes=["a", "b"])
        assert torch.equal(found.batch.images, images.float())
        assert not found.batch.images.requires_grad


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_with_code_is_refused_unread(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The variable by which torch's users switch the protection off everywhere.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    value = published() | {"accs_all_exps": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    with refused(path, "refused unread: the file holds more than tensors"):
        import_pt(path, mean=(0, 0), std=(1, 1), classes="abcd")
    assert not marker.exists()
    Malicious(marker).__reduce__()[0](marker)
    assert marker.exists()  # it would have worked


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), slice(1), print, torch.nn.Linear(1, 1)],
    ids=["array", "slice", "function", "module"],
)
def test_other_objects_are_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.pt"
    torch.save({"data": [[IMAGES, LABELS]], "more": value}, path)
    with refused(path, "refused unread"):
        import_pt(path, mean=[0], std=[1], classes=["a", "b"])


@pytest.mark.parametrize("modern", [True, False])
def test_broken_pt_files_are_refused(tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    content = path.read_bytes()
    for broken in [b"", b"no pickle at all", *(content[:i] for i in range(1, len(content), 97))]:
        path.write_bytes(broken)
        with refused(path, ": "):
            import_pt(path, mean=(0, 0), std=(1, 1), classes="abcd")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"data": []}, "holds no distilled set"),
        ({"data": [[IMAGES]]}, "holds no distilled set"),
        ({"data": 3}, "holds no distilled set"),
        (IMAGES, "holds no distilled set"),
        ([IMAGES.to_sparse(), LABELS], "holds no distilled set"),
        ([torch.zeros(1, device="meta"), LABELS], "holds no distilled set"),
        ([torch.zeros(1).expand(10**6, 1, 1000, 1000), LABELS], "holds no distilled set"),
        ([IMAGES.byte(), LABELS], "expected normalised floats"),
        ([IMAGES[0], LABELS], "given 1 means"),
        ([torch.zeros(2, 3, 2, 2), LABELS], "given 1 means"),
        ([IMAGES / 0, LABELS], "NaN"),
        ([IMAGES, LABELS + 5], "labels run from 5 to 6"),
    ],
)
def test_other_structures_are_refused(tmp_path: Path, value: Any, fault: str) -> None:
    path = tmp_path / "x.pt"
    torch.save(value, path)
    with refused(path, fault):
        import_pt(path, mean=[0], std=[1], classes=["a", "b"])


# Eight bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_export_keeps_what_quantised_says(tmp_path: Path, channels: int) -> None:
    distilled = make_set((channels, 4, 5), 7)
    paths = export_png(tmp_path / "png", distilled)
    names = [str(path.relative_to(tmp_path / "png")) for path in paths[:4]]
    assert names == ["0_cat/000.png", "1_gro_er_Hund/000.png", "2_a_b/000.png", "0_cat/001.png"]
    kept = quantised(distilled)
    opened = [Image.open(path) for path in paths]
    assert {image.mode for image in opened} == {"L" if channels == 1 else "RGB"}
    stored = torch.stack([pil_to_tensor(image) for image in opened])
    assert torch.equal(stored.float() / 255, kept.batch.images)
    assert pixel_range(kept.batch.images) == (0.0, 1.0)
    assert torch.equal(quantised(kept).batch.images, kept.batch.images)
    assert (kept.batch.images - distilled.batch.images.clamp(0, 1)).abs().max() <= 0.5001 / 255
    assert [label for _, label in ImageFolder(tmp_path / "png").samples] == [0, 0, 0, 1, 1, 2, 2]
    with refused(tmp_path / "png", "is not empty"):
        export_png(tmp_path / "png", distilled)


def test_hostile_class_names_stay_inside_the_folder(tmp_path: Path) -> None:
    names = ("../../evil", "/etc", "..")
    paths = export_png(tmp_path / "png", dataclasses.replace(make_set(), classes=names))
    assert all(path.resolve().is_relative_to(tmp_path / "png") for path in paths)
    (tmp_path / "file").touch()
    with refused(tmp_path / "file", "File exists"):
        export_png(tmp_path / "file", make_set())
    with refused(tmp_path / "two", "1 or 3 channels"):
        export_png(tmp_path / "two", make_set((2, 3, 3)))


def test_pixel_range_is_the_true_one() -> None:
    assert pixel_range(torch.tensor([[-0.5, 2.0], [0.0, 1.0]])) == (-0.5, 2.0)
    assert artifact.FORMAT_VERSION == 1
