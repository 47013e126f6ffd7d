"""Other projects' files: read without running their code, or refused."""

from __future__ import annotations

import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillsec.distill.files import safe as files
from distillsec.distill.files.artifact import save_set
from distillsec.distill.files.foreign import ForeignSet, import_pt
from distillsec.distill.preprocessing import Preprocessing, fit_zca
from distillsec.distill.types import Recipe, RequestError

Refused = Callable[[Path, str], pytest.RaisesExc[RequestError]]
IMAGES, LABELS = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])


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
    for number, (images, labels) in enumerate(published()["data"]):
        found = import_pt(
            path, preprocessing=Preprocessing(mean, std), classes=classes, number=number
        ).distilled
        scale, shift = torch.tensor(std).view(2, 1, 1), torch.tensor(mean).view(2, 1, 1)
        torch.testing.assert_close(found.batch.images, images * scale + shift)
        assert torch.equal(found.batch.labels, labels)
        assert found.recipe == Recipe(preprocessing=Preprocessing(mean, std))
        assert found.classes == tuple(classes)
        save_set(tmp_path / "converted.safetensors", found)


def test_numpy_1_names_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    found = import_pt(path, preprocessing=Preprocessing((0, 0), (1, 1)), classes="abcd")
    assert len(found.distilled.batch) == 4


def test_pairs_and_soft_labels_are_read(tmp_path: Path) -> None:
    path, images = tmp_path / "x.pt", torch.rand(3, 1, 2, 2, dtype=torch.float64)
    for value in (
        [images, torch.zeros(3, dtype=torch.int32)],
        (torch.nn.Parameter(images), torch.zeros(3).long()),
        {"images": images, "labels": torch.rand(3, 2, dtype=torch.float64).softmax(dim=1)},
    ):
        torch.save(value, path)
        imported = import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])
        found = imported.distilled
        assert imported.warnings == ()
        assert torch.equal(found.batch.images, images.float())
        assert not found.batch.images.requires_grad


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_file_with_code_is_refused_unread(
    refused: Refused, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The variable by which torch's users switch the protection off everywhere.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    value = published() | {"accs_all_exps": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    with refused(path, "refused unread: the file holds more than plain tensors"):
        import_pt(path, preprocessing=Preprocessing((0, 0), (1, 1)), classes="abcd")
    assert not marker.exists()
    Malicious(marker).__reduce__()[0](marker)
    assert marker.exists()  # it would have worked


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), slice(1), print, torch.nn.Linear(1, 1)],
    ids=["array", "slice", "function", "module"],
)
def test_other_objects_are_refused(refused: Refused, tmp_path: Path, value: Any) -> None:
    path = tmp_path / "x.pt"
    torch.save({"data": [[IMAGES, LABELS]], "more": value}, path)
    with refused(path, "refused unread"):
        import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])


@pytest.mark.parametrize("modern", [True, False])
def test_broken_pt_files_are_refused(refused: Refused, tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    content = path.read_bytes()
    for broken in [b"", b"no pickle at all", *(content[:i] for i in range(1, len(content), 97))]:
        path.write_bytes(broken)
        with refused(path, ": "):
            import_pt(path, preprocessing=Preprocessing((0, 0), (1, 1)), classes="abcd")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"data": []}, "holds no distilled set"),
        ({"data": [[IMAGES]]}, "holds no distilled set"),
        ({"data": 3}, "holds no distilled set"),
        (IMAGES, "holds no distilled set"),
        ([IMAGES, [LABELS]], "holds no distilled set"),
        ([IMAGES, 3], "holds no distilled set"),
        ({"data": [[IMAGES, LABELS]] * 1001}, "1001 sets, at most 1000"),
        ([torch.zeros(1).expand(10**6, 1, 1000, 1000), LABELS], "are stored as 1"),
        ([IMAGES.byte(), LABELS], "expected normalised floats"),
        ([IMAGES[0], LABELS], "given 1 means"),
        ([torch.zeros(2, 3, 2, 2), LABELS], "given 1 means"),
        ([IMAGES / 0, LABELS], "NaN"),
        ([IMAGES, LABELS + 5], "labels run from 5 to 6"),
    ],
)
def test_other_structures_are_refused(
    refused: Refused, tmp_path: Path, value: Any, fault: str
) -> None:
    path = tmp_path / "x.pt"
    torch.save(value, path)
    with refused(path, fault):
        import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])


BYTES = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
EXOTIC: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": IMAGES.to_sparse,
    "meta": lambda: IMAGES.to("meta"),
    "nested": lambda: torch.nested.nested_tensor([IMAGES[0], IMAGES[1]]),
    "complex": lambda: IMAGES.to(torch.complex64),
    "conjugated": lambda: IMAGES.to(torch.complex64).conj(),
    "negated": lambda: torch._neg_view(IMAGES),
    "quantised": lambda: torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8),
    "float8": lambda: IMAGES.to(torch.float8_e4m3fn),
    "float4": lambda: BYTES.view(torch.float4_e2m1fn_x2),
    "bits8": lambda: BYTES.view(torch.bits8),
    "uint16": lambda: IMAGES.to(torch.uint16),
}


@pytest.mark.parametrize("make", EXOTIC.values(), ids=EXOTIC)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.filterwarnings("ignore::UserWarning")  # that torch will not have these for ever
def test_exotic_tensors_are_refused_unread(
    refused: Refused, tmp_path: Path, make: Callable[[], torch.Tensor], place: int
) -> None:
    path, pair = tmp_path / "x.pt", [IMAGES, LABELS]
    pair[place] = make()
    torch.save(pair, path)
    with refused(path, "refused unread: the file holds more than plain tensors ("):
        import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])


BOMBS = {
    "bytearray": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "hexadecimal": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1tR."
    + b"c_codecs\nencode\n(hX\x03\x00\x00\x00hextR." * 40,
    "a deep key": b"})" + b"\x85" * 300_000 + b"Ns.",
    "many lists": b"(" + b"]" * 1_100_000 + b"l.",
    "a list of itself": b"]q\x00h\x00a.",
    "a large memo": b"]r\xff\xff\xff\xff.",
    "an attribute": b"ccollections\nOrderedDict\n}X\x04\x00\x00\x00callNsb.",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_small_pickles_stay_small(refused: Refused, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x02" + content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(path, ": "):
        import_pt(path, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_what_would_be_built_is_bounded_before(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = tmp_path / "x.pt", torch.zeros(200, 3, 32, 32).half()
    torch.save({"data": [[images, torch.arange(200) % 2]] * 500}, path)
    space = Preprocessing((0,) * 3, (1,) * 3)
    assert len(import_pt(path, preprocessing=space, classes="ab").distilled.batch) == 200
    size = images.numel() * (2 + 2 + 2 + 3 * 4) + 200 * (8 + 8 + 8 + 8)  # two readings, copies
    monkeypatch.setattr(files, "BUILT_CAP", size)
    import_pt(path, preprocessing=space, classes="ab")
    monkeypatch.setattr(files, "BUILT_CAP", size - 1)
    with refused(path, f"takes {size} bytes of memory to read, at most {size - 1}"):
        import_pt(path, preprocessing=space, classes="ab")


def test_a_packed_archive_is_refused(refused: Refused, tmp_path: Path) -> None:
    path, packed = tmp_path / "x.pt", tmp_path / "packed.pt"
    torch.save([torch.zeros(2, 1, 500, 500), LABELS], path)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(packed, "w") as bad:
        for record in good.infolist():
            bad.writestr(record.filename, good.read(record), zipfile.ZIP_DEFLATED)
    with refused(packed, "torch writes no such file"):
        import_pt(packed, preprocessing=Preprocessing((0,), (1,)), classes=["a", "b"])


def test_parts_of_larger_tensors_and_other_types_are_read(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.pt", torch.randn(6, 1, 4, 4)
    labels = torch.arange(12)[::4].to(torch.int16) % 2
    for modern in (True, False):
        for images in (whole[1:4], whole.half()[::2], whole.bfloat16().transpose(2, 3)[:3]):
            torch.save([images, labels], path, _use_new_zipfile_serialization=modern)
            space = Preprocessing((0,), (1,))
            found = import_pt(path, preprocessing=space, classes=["a", "b"]).distilled.batch
            assert torch.equal(found.images, images.float())
            assert torch.equal(found.labels, labels.long())


def test_a_whitened_file_comes_back_to_pixels(tmp_path: Path) -> None:
    pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    zca = fit_zca(pixels)
    path = tmp_path / "whitened.pt"
    torch.save([zca.whiten(pixels), torch.arange(40) % 2], path)
    space = Preprocessing((0.0,), (1.0,), zca)
    found = import_pt(path, preprocessing=space, classes=("a", "b")).distilled
    torch.testing.assert_close(found.batch.images, pixels, atol=1e-4, rtol=0)
    assert found.recipe.preprocessing.zca == zca


# What the values mean -----------------------------------------------------------------------------

SPACE = Preprocessing((0.5,), (0.25,))


def imported(path: Path, value: Any, **options: Any) -> ForeignSet:
    torch.save(value, path)
    return import_pt(path, preprocessing=SPACE, classes=["a", "b"], **options)


def normalised(count: int = 2) -> torch.Tensor:
    """Images whose pixels fill [0, 1]."""
    return torch.linspace(-2, 2, count * 4).view(count, 1, 2, 2)


def test_several_sets_are_counted_and_one_is_chosen(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    value = {"data": [[normalised() * share, LABELS] for share in (1.0, 0.5, 0.2)]}
    first = imported(path, value)
    assert first.warnings == ("set 0 of the 3 in the file: --set-number N chooses another",)
    chosen = imported(path, value, number=2)
    assert chosen.warnings == ()
    torch.testing.assert_close(chosen.distilled.batch.images, normalised() * 0.05 + 0.5)
    with refused(path, "holds 3 sets, numbered from 0: there is no set 3"):
        imported(path, value, number=3)


def test_other_content_of_a_file_is_named(tmp_path: Path) -> None:
    value = {"images": normalised(), "labels": LABELS, "lr": torch.tensor(0.1)}
    assert imported(tmp_path / "x.pt", value).warnings == ("left out of the file: lr",)


def test_logits_become_probabilities(tmp_path: Path) -> None:
    path, logits = tmp_path / "x.pt", torch.tensor([[-3.0, 9.0], [4.0, 1.0]])
    found = imported(path, [normalised(), logits])
    assert found.warnings == ("its soft labels are logits: a softmax makes them probabilities",)
    assert torch.equal(found.distilled.batch.labels, logits.softmax(dim=1))
    as_logarithms = imported(path, [normalised(), logits.log_softmax(dim=1)])
    torch.testing.assert_close(as_logarithms.distilled.batch.labels, found.distilled.batch.labels)
    halved = imported(path, [normalised(), logits.softmax(dim=1).half()])
    assert halved.warnings == ()


@pytest.mark.parametrize(
    "labels",
    [
        [[90.0, 10.0], [5.0, 95.0]],  # percent
        [[0.0, 0.0], [1.0, 0.0]],
        [[0.5, -0.5], [-0.5, 0.5]],  # centred, for regression
        [[1.02, -0.02], [0.0, 1.0]],  # learned without a bound
    ],
)
def test_rows_that_are_no_distribution_are_refused(
    refused: Refused, tmp_path: Path, labels: list[list[float]]
) -> None:
    with refused(tmp_path / "x.pt", "neither probabilities, which sum to 1, nor logits"):
        imported(tmp_path / "x.pt", [normalised(), torch.tensor(labels)])


def test_pixels_on_another_scale_are_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with refused(path, "pixels from 0 to 255?"):
        imported(path, [torch.linspace(0, 255, 8).view(2, 1, 2, 2), LABELS])
    (text,) = imported(path, [torch.linspace(0, 1, 8).view(2, 1, 2, 2), LABELS]).warnings
    assert "no negative value: were they normalised?" in text


def test_pixels_outside_their_range_are_pointed_out(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    (text,) = imported(path, [normalised() * 2, LABELS]).warnings
    assert text.startswith("its pixels run from -0.5 to 1.5, 50% of them outside [0, 1]: were they")
    assert imported(path, [normalised() * 1.0001, LABELS]).warnings == ()  # rounding
