"""Folders of images are read in a fixed order; a bad image is named."""

import contextlib
import io
import os
import socket
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sampimp.data import images as images_module
from sampimp.data import load_source
from sampimp.data.images import decode_image, decode_images, image_blocks, list_images
from sampimp.errors import DataError


def save_folder(root: Path, mode: str = "RGB", names=("b.png", "a.PNG", "10.png")) -> np.ndarray:
    """Write 3 training images and 1 test image of 2 classes, 5 x 4 pixels; return all pixels."""
    shape = (4, 5) if mode == "L" else (4, 5, 3)
    images = np.random.default_rng(1).integers(0, 256, (8, *shape), dtype=np.uint8)
    number = 0
    for part, files in (("train", sorted(names)), ("test", ["x.png"])):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for file in files:
                Image.fromarray(images[number]).save(folder / file)
                number += 1
    return images


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folder_is_read_in_sorted_order(tmp_path, mode):
    images = save_folder(tmp_path, mode)
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    listed = list_images(tmp_path)
    assert listed.class_names == ("cat", "dog")
    # Sorted by code point: digits, upper case, lower case.
    assert [Path(path).name for path in listed.train_paths[:3]] == ["10.png", "a.PNG", "b.png"]
    np.testing.assert_array_equal(listed.train_labels, [0, 0, 0, 1, 1, 1])
    source = load_source(f"folder:{tmp_path}")
    expected = images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(source.train_values, expected[:6], strict=True)
    np.testing.assert_array_equal(source.test_values, expected[6:], strict=True)
    np.testing.assert_array_equal(source.test_labels, np.array([0, 1]), strict=True)
    assert source.train_values.flags.c_contiguous
    assert source.full_scale == 255
    assert source.train_files[:2] == ("train/cat/10.png", "train/cat/a.PNG")
    assert source.test_files == ("test/cat/x.png", "test/dog/x.png")


def save_image(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


BLACK = np.zeros((4, 5, 3), dtype=np.uint8)


def test_images_of_different_sizes_are_turned_scaled_and_cropped_to_the_centre(tmp_path):
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    wide = np.concatenate([np.zeros_like(centre), centre, np.full_like(centre, 255)], axis=1)
    plain = np.full((24, 12, 3), (10, 20, 30), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter: the first row is the right column
    save_image(tmp_path / "train/cat/1.png", wide)
    save_image(tmp_path / "train/cat/2.png", centre, exif=exif)
    save_image(tmp_path / "train/dog/1.png", plain)
    save_image(tmp_path / "train/dog/2.png", centre[:, :, 0])
    for name in ("cat", "dog"):
        save_image(tmp_path / "test" / name / "1.png", np.full((9, 7), 77, dtype=np.uint8))
    source = load_source(f"folder:{tmp_path}", image_size=6)
    grey = np.repeat(centre[:, :, :1], 3, axis=2)
    expected = [centre, np.rot90(centre, -1), np.full_like(centre, (10, 20, 30)), grey]
    np.testing.assert_array_equal(source.train_values.transpose(0, 2, 3, 1), expected, strict=True)
    np.testing.assert_array_equal(source.test_values, np.full((2, 3, 6, 6), 77))
    assert source.image_size == 6


def test_resized_grey_images_have_one_channel(tmp_path):
    save_folder(tmp_path, "L")
    assert load_source(f"folder:{tmp_path}", image_size=3).train_values.shape == (6, 1, 3, 3)


def test_the_refusal_of_different_sizes_names_the_option(tmp_path):
    save_folder(tmp_path)
    save_image(tmp_path / "train/dog/a.PNG", np.zeros((4, 6, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="6x4 pixels of 3 channels") as caught:
        load_source(f"folder:{tmp_path}")
    assert "--image-size 64" in caught.value.todo


def test_relative_folder_has_absolute_paths(tmp_path, monkeypatch):
    save_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    assert list_images("pets").train_paths[0] == str(tmp_path / "pets/train/cat/10.png")


def test_block_size_does_not_change_the_source(tmp_path, monkeypatch):
    save_folder(tmp_path)
    whole = load_source(f"folder:{tmp_path}")
    monkeypatch.setattr(images_module, "_BLOCK_BYTES", 3 * 60)  # three images of 4 x 5 x 3 bytes
    shape, blocks = image_blocks(list_images(tmp_path))
    assert shape == (3, 4, 5)
    assert blocks == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert load_source(f"folder:{tmp_path}").digest == whole.digest


@pytest.mark.parametrize(
    ("break_layout", "message"),
    [
        (lambda root: (root / "test").rename(root / "validation"), "no folder test/"),
        (lambda root: (root / "train").rename(root / "training"), "no folder train/"),
        (lambda root: (root / "test/dog").rename(root / "test/dogs"), "in test/ alone: dogs"),
        (lambda root: (root / "test/dog").rename(root / "dog"), "in train/ alone: dog"),
        (lambda root: (root / "train/emu").mkdir(), "none in 1 of 3: emu"),
        (lambda root: (root / "train").rename(root / "x") and (root / "train").mkdir(), "no class"),
        (lambda root: save_image(root / "test/x.JPG", BLACK), "an image in no class folder"),
        (lambda root: save_image(root / "train/dog/small/x.png", BLACK), "a folder, whose images"),
    ],
)
def test_wrong_folder_layout_is_refused(tmp_path, break_layout, message):
    save_folder(tmp_path)
    break_layout(tmp_path)
    with pytest.raises(DataError, match=message):
        list_images(tmp_path)


def test_files_that_are_no_images_by_their_suffix_are_named(tmp_path):
    save_folder(tmp_path)
    assert load_source(f"folder:{tmp_path}").notes == ()
    for name in ("train/dog/a.heic", "train/.DS_Store", "train/dog/.hidden", "test/README.md"):
        (tmp_path / name).write_bytes(b"")
    (note,) = load_source(f"folder:{tmp_path}").notes
    assert note == (
        "2 files are no images by the suffix, and left out: test/README.md, train/dog/a.heic."
    )


@pytest.mark.parametrize("size", [0, -4, 8193, 10**6])
def test_a_size_out_of_range_is_refused(tmp_path, size):
    save_folder(tmp_path)
    with pytest.raises(DataError, match=rf"from 1 to 8,192 pixels\n.*{size:,}"):
        load_source(f"folder:{tmp_path}", image_size=size)


def test_images_larger_than_the_memory_are_refused(tmp_path, monkeypatch):
    save_folder(tmp_path)
    monkeypatch.setattr(images_module, "machine_memory", lambda: 8 * 60 - 1)
    with pytest.raises(DataError, match=r"8 of 5x4 pixels(.|\n)*--image-size 64"):
        load_source(f"folder:{tmp_path}")
    monkeypatch.setattr(images_module, "machine_memory", lambda: 8 * 60)
    load_source(f"folder:{tmp_path}")


def test_error_names_the_first_bad_image(tmp_path, monkeypatch):
    save_folder(tmp_path)
    monkeypatch.setattr(images_module, "_BLOCK_BYTES", 60)  # one image per block: threads race
    first, second = tmp_path / "train/cat/a.PNG", tmp_path / "train/dog/b.png"
    second.write_bytes(b"no image")
    with pytest.raises(DataError, match=f"UnidentifiedImageError(.|\n)*{second}"):
        load_source(f"folder:{tmp_path}")
    first.write_bytes(first.read_bytes()[:60])
    with pytest.raises(DataError, match=f"{first}"):
        load_source(f"folder:{tmp_path}")
    Image.new("RGB", (6, 4)).save(first)
    with pytest.raises(DataError, match=f"has 5x4 pixels of 3(.|\n)*6x4(.|\n)*{first}"):
        load_source(f"folder:{tmp_path}")
    Image.new("L", (5, 4)).save(first)
    with pytest.raises(DataError, match=f"5x4 pixels of 1 (.|\n)*{first}"):
        load_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("mode", "values"), [("L", [[[7]]]), ("RGB", [[[7, 7, 7]]]), ("1", [[[255]]])]
)
def test_decoded_values_of_each_mode(tmp_path, mode, values):
    Image.new(mode, (1, 1), 7 if mode != "RGB" else (7, 7, 7)).save(tmp_path / "a.png")
    decoded = decode_image(tmp_path / "a.png")
    np.testing.assert_array_equal(decoded, np.array(values, np.uint8), strict=True)


def test_palette_image_is_decoded_without_loss(tmp_path):
    image = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8))
    image.quantize(2).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png"), [[[9, 8, 7], [1, 2, 3]]])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_mode_without_lossless_8_bit_form_is_refused(tmp_path, mode):
    Image.new(mode, (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=f"mode {mode}(.|\n)*a.png"):
        decode_image(tmp_path / "a.png")


@settings(max_examples=150)
@given(draw=st.data())
def test_damaged_files_raise_no_other_error(tmp_path_factory, draw):
    """Any bytes are decoded or raise DataError."""
    kind = draw.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    content = bytearray(stream.getvalue())
    head = st.integers(0, min(200, len(content)) - 1)
    for _ in range(draw.draw(st.integers(1, 4))):
        content[draw.draw(head)] = draw.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    path.write_bytes(content[: draw.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings(), contextlib.suppress(DataError):
        warnings.simplefilter("ignore")  # Pillow warns before it fails
        assert decode_image(path).dtype == np.uint8


def test_numbers_of_paths_and_outputs_must_agree(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        decode_images([], np.zeros((1, 3, 4, 5), np.uint8))


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_loop, Path.mkdir])
def test_what_is_no_file_is_refused_by_its_name(tmp_path, monkeypatch, make):
    save_folder(tmp_path)
    monkeypatch.chdir(tmp_path / "train" / "dog")  # paths of sockets have a limit
    make(Path("x.png"))
    with pytest.raises(DataError, match=r"Got a (folder|pipe),(.|\n)*train/dog/x\.png"):
        list_images(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied")

    save_folder(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"Got Permission denied(.|\n)*train"):
        list_images(tmp_path)


@pytest.mark.parametrize("place", ["train/caf\udce9", "train/cat/caf\udce9.png"])
def test_a_name_that_is_not_utf8_is_refused_with_its_folder(tmp_path, place):
    save_folder(tmp_path)
    if place.endswith(".png"):
        (tmp_path / "train/cat/a.PNG").rename(tmp_path / place)
    else:
        (tmp_path / "train/cat").rename(tmp_path / place)
    with pytest.raises(DataError, match=rf"caf\\xe9(.|\n)*Where {tmp_path}/train") as raised:
        list_images(tmp_path)
    str(raised.value).encode()


def test_an_image_that_claims_too_many_pixels_is_not_decoded(tmp_path):
    save_folder(tmp_path)
    path = tmp_path / "train" / "cat" / "a.PNG"
    content = bytearray(path.read_bytes())
    content[16:24] = (9_000).to_bytes(4, "big") * 2  # width and height in the first chunk
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"9000x9000 pixels(.|\n)*a\.PNG"):
        decode_image(path)
