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
from distillsec.distill.files.formats import read_received
from distillsec.distill.files.formats.stored_set import StoredSet
from distillsec.distill.types import RequestError

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


def read(path: Path, number: int | None = None) -> StoredSet:
    """The set in a file of ``torch.save``."""
    form, found = read_received(path, number)
    assert form == "torch file"
    return found


@pytest.mark.parametrize("modern", [True, False])
def test_published_files_are_read(tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "res_DC.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    for number, (images, labels) in enumerate(published()["data"]):
        found = read(path, number)
        assert torch.equal(found.images, images) and found.labels is not None
        assert torch.equal(found.labels, labels)
        assert (found.files, found.classes, found.rate, found.notes) == ((path,), None, None, ())


def test_numpy_1_names_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(read(path).images) == 4


def test_pairs_and_soft_labels_are_read(tmp_path: Path) -> None:
    path, images = tmp_path / "x.pt", torch.rand(3, 1, 2, 2, dtype=torch.float64)
    for value in (
        [images, torch.zeros(3, dtype=torch.int32)],
        (torch.nn.Parameter(images), torch.zeros(3).long()),
        {"images": images, "labels": torch.rand(3, 2, dtype=torch.float64).softmax(dim=1)},
    ):
        torch.save(value, path)
        found = read(path)
        assert found.notes == ()
        assert torch.equal(found.images, images.float())
        assert not found.images.requires_grad


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
        read(path)
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
        read(path)


@pytest.mark.parametrize("modern", [True, False])
def test_broken_pt_files_are_refused(refused: Refused, tmp_path: Path, modern: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=modern)
    content = path.read_bytes()
    for broken in [b"", b"no pickle at all", *(content[:i] for i in range(1, len(content), 97))]:
        path.write_bytes(broken)
        with refused(path, ": "):
            read(path)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"data": []}, "holds no distilled set"),
        ({"data": [[IMAGES]]}, "holds no distilled set"),
        ({"data": 3}, "holds no distilled set"),
        ([IMAGES, [LABELS]], "holds no distilled set"),
        ([IMAGES, 3], "holds no distilled set"),
        ({"data": [[IMAGES, LABELS]] * 1001}, "1001 sets, at most 1000"),
        ([torch.zeros(1).expand(10**6, 1, 1000, 1000), LABELS], "are stored as 1"),
        ([IMAGES[0], LABELS], "images have the shape (1, 2, 2)"),
        ([IMAGES[:0], LABELS[:0]], "images have the shape (0, 1, 2, 2)"),
        ([IMAGES / 0, LABELS], "images hold NaN"),
        ([IMAGES, LABELS[:1]], "labels have the shape (1,), expected (2,)"),
        ([IMAGES, LABELS + 0.5], "fractions"),
        ([IMAGES, IMAGES[:, :, :, 0]], "labels have the shape (2, 1, 2)"),
    ],
)
def test_other_structures_are_refused(
    refused: Refused, tmp_path: Path, value: Any, fault: str
) -> None:
    path = tmp_path / "x.pt"
    torch.save(value, path)
    with refused(path, fault):
        read(path)


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
        read(path)


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
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_what_would_be_built_is_bounded_before(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, images = tmp_path / "x.pt", torch.zeros(200, 3, 32, 32).half()
    torch.save({"data": [[images, torch.arange(200) % 2]] * 500}, path)
    assert len(read(path).images) == 200
    size = images.numel() * (2 + 2 + 2 + 3 * 4) + 200 * (8 + 8 + 8 + 8)  # two readings, copies
    monkeypatch.setattr(files, "BUILT_CAP", size)
    read(path)
    monkeypatch.setattr(files, "BUILT_CAP", size - 1)
    with refused(path, f"takes {size} bytes of memory to read, at most {size - 1}"):
        read(path)


def test_a_packed_archive_is_refused(refused: Refused, tmp_path: Path) -> None:
    path, packed = tmp_path / "x.pt", tmp_path / "packed.pt"
    torch.save([torch.zeros(2, 1, 500, 500), LABELS], path)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(packed, "w") as bad:
        for record in good.infolist():
            bad.writestr(record.filename, good.read(record), zipfile.ZIP_DEFLATED)
    with refused(packed, "torch writes no such file"):
        read(packed)


def test_parts_of_larger_tensors_and_other_types_are_read(tmp_path: Path) -> None:
    path, whole = tmp_path / "x.pt", torch.randn(6, 1, 4, 4)
    labels = torch.arange(12)[::4].to(torch.int16) % 2
    for modern in (True, False):
        for images in (whole[1:4], whole.half()[::2], whole.bfloat16().transpose(2, 3)[:3]):
            torch.save([images, labels], path, _use_new_zipfile_serialization=modern)
            found = read(path)
            assert torch.equal(found.images, images.float()) and found.labels is not None
            assert torch.equal(found.labels, labels.long())


# What the values mean -----------------------------------------------------------------------------


def saved(path: Path, value: Any, number: int | None = None) -> StoredSet:
    torch.save(value, path)
    return read(path, number)


def test_several_sets_are_counted_and_one_is_chosen(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    value = {"data": [[IMAGES + share, LABELS] for share in (1.0, 0.5, 0.25)]}
    first = saved(path, value)
    assert first.notes == ("set 0 of the 3 in the file: --set-number N chooses another",)
    chosen = saved(path, value, number=2)
    assert chosen.notes == () and torch.equal(chosen.images, IMAGES + 0.25)
    with refused(path, "holds 3 sets, numbered from 0: there is no set 3"):
        saved(path, value, number=3)


def test_a_flat_pair_is_one_set(refused: Refused, tmp_path: Path) -> None:
    """DataDAM shares such files."""
    found = saved(tmp_path / "x.pt", {"data": [IMAGES + 1, LABELS]})
    assert found.notes == () and torch.equal(found.images, IMAGES + 1)
    with refused(tmp_path / "x.pt", "holds one set: there is no set 1"):
        read(tmp_path / "x.pt", 1)


def test_channels_in_the_last_place_are_moved(tmp_path: Path) -> None:
    images = torch.rand(2, 8, 8, 3)
    found = saved(tmp_path / "x.pt", [images, LABELS])
    assert torch.equal(found.images, images.permute(0, 3, 1, 2))
    assert found.notes == ("its channels are in the last place: moved to the front",)


def test_bytes_stay_bytes(tmp_path: Path) -> None:
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    assert torch.equal(saved(tmp_path / "x.pt", [images, LABELS]).images, images)


def test_other_content_of_a_file_is_named(refused: Refused, tmp_path: Path) -> None:
    value = {"images": IMAGES, "labels": LABELS, "lr": torch.tensor(0.125), "epoch": 3}
    found = saved(tmp_path / "x.pt", value)
    assert found.rate == 0.125
    assert found.notes == ("learning rate 0.125 of the file", "left out of the file: epoch")
    for rate in (0.0, -1.0, float("nan"), 1e30):
        with refused(tmp_path / "x.pt", "holds the learning rate"):
            saved(tmp_path / "x.pt", value | {"lr": torch.tensor(rate)})


def test_logits_become_probabilities(tmp_path: Path) -> None:
    path, logits = tmp_path / "x.pt", torch.tensor([[-3.0, 9.0], [4.0, 1.0]])
    found = saved(path, [IMAGES, logits])
    assert found.notes == ("its soft labels are logits: a softmax makes them probabilities",)
    assert found.labels is not None and torch.equal(found.labels, logits.softmax(dim=1))
    as_logarithms = saved(path, [IMAGES, logits.log_softmax(dim=1)])
    torch.testing.assert_close(as_logarithms.labels, found.labels)
    assert saved(path, [IMAGES, logits.softmax(dim=1).half()]).notes == ()


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
        saved(tmp_path / "x.pt", [IMAGES, torch.tensor(labels)])


# A file each --------------------------------------------------------------------------------------


def separate(folder: Path, name: str, **tensors: torch.Tensor) -> Path:
    """Files that are called ``name`` with the tensors' words in place of "WORD"."""
    folder.mkdir(exist_ok=True)
    for word, tensor in tensors.items():
        torch.save(tensor, folder / name.replace("WORD", word))
    return folder / name.replace("WORD", "images")


@pytest.mark.parametrize("name", ["WORD_best.pt", "WORD_100.pt", "WORD.pt", "CIFAR10_WORD.pt"])
def test_labels_and_the_rate_lie_beside_the_images(tmp_path: Path, name: str) -> None:
    rate, logits = torch.tensor(0.25), torch.tensor([[-3.0, 9.0], [4.0, 1.0]])
    path = separate(tmp_path, name, images=IMAGES, labels=logits, lr=rate)
    found = read(path)
    assert found.labels is not None and torch.equal(found.labels, logits.softmax(dim=1))
    assert found.rate == 0.25
    names = [name.replace("WORD", word) for word in ("images", "labels", "lr")]
    assert [file.name for file in found.files] == names
    assert found.notes == (
        f"labels of {names[1]}, beside the images",
        "its soft labels are logits: a softmax makes them probabilities",
        f"learning rate 0.25 of {names[2]}",
    )


def test_a_picture_of_whitened_images_shares_their_labels(tmp_path: Path) -> None:
    separate(tmp_path, "WORD_9.pt", images=IMAGES, labels=LABELS)
    torch.save(IMAGES + 1, tmp_path / "images_zca_9.pt")
    found = read(tmp_path / "images_zca_9.pt")
    assert [file.name for file in found.files] == ["images_zca_9.pt", "labels_9.pt"]


def test_images_alone_have_no_labels(refused: Refused, tmp_path: Path) -> None:
    path = separate(tmp_path, "WORD.pt", images=IMAGES, labels=LABELS)
    (tmp_path / "labels.pt").unlink()
    assert read(path).labels is None
    torch.save(LABELS, path)
    with refused(path, "holds a tensor (2,), expected images (N, C, H, W)"):
        read(path)
    torch.save(IMAGES, path)
    torch.save(LABELS[:1], tmp_path / "labels.pt")
    with refused(tmp_path / "labels.pt", "not the labels of 2 images"):
        read(path)
    torch.save([LABELS], tmp_path / "labels.pt")
    with refused(tmp_path / "labels.pt", "expected one tensor"):
        read(path)


def test_a_folder_of_tensors(refused: Refused, tmp_path: Path) -> None:
    """DD-Ranking's, by name; or by shape where no name says which the labels are."""
    separate(tmp_path / "named", "WORD.pt", images=IMAGES, labels=LABELS, lr=torch.tensor(0.5))
    form, found = read_received(tmp_path / "named")
    assert (form, found.rate, found.labels is not None) == ("tensor folder", 0.5, True)
    separate(tmp_path / "other", "WORD.pt", data=IMAGES, targets=LABELS, step=torch.tensor(3))
    found = read_received(tmp_path / "other")[1]
    assert [file.name for file in found.files] == ["data.pt", "targets.pt"]
    torch.save(IMAGES, tmp_path / "named" / "images_2.pt")
    with refused(tmp_path / "named", "2 files of images (images.pt, images_2.pt): name the one"):
        read_received(tmp_path / "named")
