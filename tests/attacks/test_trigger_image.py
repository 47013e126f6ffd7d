"""``trigger_image``: what is read and refused, and what the configuration says of it."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

from distillsec.attacks import ATTACKS, Attack, DataInfo
from distillsec.attacks.trigger_image import TriggerImageOptions
from distillsec.distill.types import RequestError
from distillsec.eval.config.schema import configure


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 6)) -> str:
    state = np.random.RandomState(0)
    bands = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = state.randint(0, 256, (*size[::-1], bands), dtype=np.uint8)
    Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode).save(path)
    return str(path)


def make(name: str, data: DataInfo, **options: Any) -> Attack:
    return ATTACKS[name](ATTACKS[name].Options.model_validate(options), data)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_triggers_size_keeps_its_values(
    mode: str, channels: int, tmp_path: Path
) -> None:
    path = picture(tmp_path / "a.png", mode, size=(5, 4))
    found = TriggerImageOptions(trigger_image=path).image((channels, 4, 5))
    assert found is not None and found.shape == (channels, 4, 5) and found.dtype == torch.float32
    pixels = np.asarray(Image.open(path), dtype=np.float64) / 255
    if mode == "RGB" and channels == 1:
        pixels = pixels @ [0.299, 0.587, 0.114]  # ITU-R 601
    wanted = np.broadcast_to(
        pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), found.shape
    )
    assert np.abs(found.numpy() - wanted).max() < 1 / 255


def test_it_is_resized_antialiased(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    board = np.kron((np.indices((8, 8)).sum(0) % 2), np.ones((2, 2))) * 255
    Image.fromarray(board.astype(np.uint8)).save(path)
    found = TriggerImageOptions(trigger_image=str(path)).image((1, 4, 4))
    assert found is not None
    assert bool(((found - 0.5).abs() < 0.02).all())  # a mean over black and white


def test_it_takes_the_place_of_the_square_and_of_the_pattern(
    toy_data_info: DataInfo, tmp_path: Path
) -> None:
    path = picture(tmp_path / "a.png", "L", size=(3, 3))
    pixels = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)
    square = make("naive", toy_data_info, trigger_size=3, trigger_image=path).trigger
    stamped = square.stamp(torch.full((1, 1, 8, 8), 0.25))
    assert torch.allclose(stamped[0, 0, 4:7, 4:7], pixels)
    assert int((stamped != 0.25).sum()) == 9
    whole = picture(tmp_path / "b.png", "L", size=(8, 8))
    values = torch.from_numpy(np.asarray(Image.open(whole), dtype=np.float32) / 255)
    blend = make("blended", toy_data_info, alpha=0.5, trigger_image=whole).trigger
    assert torch.allclose(blend.stamp(torch.zeros(1, 1, 8, 8))[0, 0], values / 2, atol=1e-6)


# The configuration -------------------------------------------------------------------------------


def test_the_configuration_has_the_contents_digest(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    config = configure(attack="naive", trigger_image=path)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    assert config.flat()["trigger_image"] == f"{path}@{digest}"
    assert configure(**config.flat()) == config
    picture(tmp_path / "a.png", size=(7, 7))
    other = configure(attack="naive", trigger_image=path)
    assert other.key() != config.key() and other.control_key() == config.control_key()
    # Without the file too: a configuration that has the digest reads nothing.
    Path(path).unlink()
    assert configure(**config.flat()).key() == config.key()


def test_configurations_without_it_are_what_they_were() -> None:
    for name in ("naive", "blended"):
        assert "trigger_image" not in configure(attack=name).flat()


def test_a_file_that_changed_or_went_is_refused(toy_data_info: DataInfo, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    recorded = configure(attack="naive", trigger_image=path).flat()["trigger_image"]
    picture(tmp_path / "a.png", size=(7, 7))
    with pytest.raises(RequestError, match=r"a.png: has changed: its digest is .*, recorded is"):
        make("naive", toy_data_info, trigger_image=recorded)
    Path(path).unlink()
    with pytest.raises(RequestError, match=r"a\.png: no such file"):
        make("naive", toy_data_info, trigger_image=recorded)


def test_other_attacks_do_not_have_it(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    with pytest.raises(RequestError, match="trigger_image is an option of naive, blended"):
        configure(attack="doorping", trigger_image=path)


# Files that are refused --------------------------------------------------------------------------


def png(width: int, height: int, depth: int = 8, kind: int = 0, data: bytes = b"") -> bytes:
    """A PNG whose header may promise more than the data hold."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, kind, 0, 0, 0])
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gif() -> bytes:
    content = io.BytesIO()
    Image.new("L", (4, 4)).save(content, "GIF")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable PNG or JPEG"),
        (b"no image at all", "not a readable PNG or JPEG"),
        (gif(), "not a readable PNG or JPEG"),
        (png(4, 4, data=b"\0" * 20)[:46], "not a readable PNG or JPEG"),
        (png(4097, 1), "4097×1 pixels, at most 4096 a side"),
        (png(60000, 60000), "not a readable PNG or JPEG"),
        (png(2, 1, depth=16, data=b"\0" * 5), "mode I;16: only images of 8 bits"),
        (png(1, 1, kind=6, data=b"\0\1\2\3\4"), "transparent in places"),
        (b"\0" * (16 * 2**20 + 1), "too large"),
    ],
)
def test_files_that_cannot_be_a_trigger_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "hostile.png"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=rf"hostile.png: .*({message})"):
        configure(attack="naive", trigger_image=str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("none.png", "no such file"), (".", "a folder"), ("pipe", "a pipe")):
        with pytest.raises(RequestError, match=message):
            configure(attack="blended", trigger_image=str(tmp_path / name))


def test_an_opaque_alpha_channel_is_no_transparency(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (3, 3), (255, 0, 0, 255)).save(path)
    found = TriggerImageOptions(trigger_image=str(path)).image((3, 3, 3))
    assert found is not None and found[:, 0, 0].tolist() == [1, 0, 0]


# The command line --------------------------------------------------------------------------------


def test_the_command_line_has_it(cli: Callable[..., Result], tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    done = cli("attack", "--preset", "digits-naive", "--trigger-image", path, "--print-config")
    assert done.exit_code == 0 and f"trigger_image: {path}@" in done.stdout.replace("\n  ", " ")
    missing = cli("attack", "--preset", "digits-naive", "--trigger-image", "none.png")
    assert missing.exit_code == 2 and missing.stderr.endswith("none.png: no such file\n")
