"""Arrays of .npz files keep their values; damaged or unfit files are named."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sampimp.data import load_source
from sampimp.errors import DataError


def save_npz(path: Path, **changes) -> str:
    """Save arrays, some of them replaced, and return the name of the data set."""
    arrays = {
        "train_inputs": np.arange(12.0).reshape(4, 3),
        "train_labels": np.array([0, 2, 0, 1], dtype=np.int8),
        "test_inputs": np.ones((2, 3)),
        "test_labels": np.array([1, 0], dtype=np.uint16),
    }
    np.savez(path, **(arrays | changes))
    return f"npz:{path}"


def test_float64_inputs_and_integer_labels_are_converted(tmp_path):
    source = load_source(save_npz(tmp_path / "a.npz"))
    np.testing.assert_array_equal(
        source.train_values, np.arange(12, dtype=np.float32).reshape(4, 3), strict=True
    )
    np.testing.assert_array_equal(source.train_labels, np.array([0, 2, 0, 1]), strict=True)
    assert source.full_scale == 1
    assert source.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("train", "test", "names", "numbers"),
    [
        (["no", "é", "no", "yes"], ["yes", "no"], ("no", "yes", "é"), [0, 2, 0, 1]),
        ([b"b", b"a", b"\xff", b"b"], [b"b", b"a"], ("\\xff", "a", "b"), [2, 1, 0, 2]),
        ([True, False, False, True], [True, False], ("False", "True"), [1, 0, 0, 1]),
    ],
)
def test_texts_and_truth_values_are_the_names_of_classes(tmp_path, train, test, names, numbers):
    name = save_npz(tmp_path / "a.npz", train_labels=np.array(train), test_labels=np.array(test))
    source = load_source(name)
    assert source.class_names == names
    np.testing.assert_array_equal(source.train_labels, np.array(numbers), strict=True)
    np.testing.assert_array_equal(
        source.test_labels, source.train_labels[[train.index(each) for each in test]]
    )


def test_dtypes_and_memory_layouts(tmp_path):
    images = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    name = save_npz(tmp_path / "a.npz", train_inputs=images, test_inputs=images[:2])
    assert load_source(name).full_scale == 255
    assert load_source(name).train_values.dtype == np.uint8
    floats = np.arange(24.0).reshape(4, 3, 2)
    plain = save_npz(tmp_path / "b.npz", train_inputs=floats, test_inputs=floats[:2])
    odd = save_npz(
        tmp_path / "c.npz",
        train_inputs=np.asfortranarray(floats.astype(">f4")),
        test_inputs=floats[:2].astype(np.float16),
    )
    assert load_source(plain).digest == load_source(odd).digest
    assert load_source(odd).train_values.flags.c_contiguous


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_inputs": np.zeros((4, 3), np.int64)}, r"int64 \[4, 3\]"),
        ({"train_inputs": np.full((4, 3), 1e300)}, "inf at sample 0"),
        ({"train_inputs": np.float64(3)}, r"float32 \[\]"),
        ({"train_labels": np.array(["a", "b", "c", "d"])}, r"texts in both\n.*<U1 \[4\]"),
        ({"train_labels": np.eye(4, dtype=int)}, r"int64 \[4, 4\]\n.*\n.*argmax"),
        ({"train_labels": np.eye(4)}, r"float64 \[4, 4\].*\n.*\n.*argmax"),
        ({"train_labels": np.zeros((4, 1), int)}, r"int64 \[4, 1\]\n.*\n.*labels\[:, 0\]"),
        ({"train_inputs": np.zeros((4, 8, 8, 3), np.uint8)}, r"which is \[N, H, W, C\]"),
        ({"train_labels": np.array([[["a"]]]), "test_labels": np.array("a")}, r"<U1 \[1, 1, 1\]"),
        ({"train_labels": np.array([0.0, np.nan, 1, 1])}, r"float64 \[4\], 3 different values"),
        (
            {"test_labels": np.array([0.5, 1])},
            r"(?s)a study trains classifiers.*test_labels\n.*bin",
        ),
        ({"train_labels": np.array(["a", None])}, r"train_labels.npy has .*array.astype\(str\)"),
        ({"train_labels": np.array([0, 10**12, 0, 1])}, r"labels in 0..3\n.*1000000000000 at"),
        ({"train_labels": np.array([], dtype=np.int64)}, "4 inputs and 0 labels"),
        ({"test_labels": np.array([1, -3])}, "-3 at sample 1"),
        ({"test_labels": np.array([1, 3])}, "no training sample of 1 of its classes: 3"),
        ({"train_inputs": np.array([{}, {}, {}, {}])}, "pickled objects, which are not read"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_source(save_npz(tmp_path / "a.npz", **changes))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 4), (3, 8, 3), (8, 8)])
def test_images_with_colours_first_are_taken(tmp_path, shape):
    images = np.zeros((4, *shape), np.uint8)
    name = save_npz(tmp_path / "a.npz", train_inputs=images, test_inputs=images[:2])
    assert load_source(name).train_values.shape == images.shape


def test_classes_without_a_training_sample_are_named(tmp_path):
    name = save_npz(tmp_path / "a.npz", train_labels=[3, 1, 3, 1], test_labels=[1, 3])
    (note,) = load_source(name).notes
    assert note.startswith("2 of 4 classes have no training sample: 0, 2. Number")


def test_missing_and_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="no such file"):
        load_source(f"npz:{path}")
    np.savez(path, train_inputs=np.zeros((2, 2)), y=np.zeros(2))
    with pytest.raises(DataError, match="the arrays train_inputs, y"):
        load_source(f"npz:{path}")
    save_npz(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=f"{len(whole) - 40:,} bytes that is not an .npz archive"):
        load_source(f"npz:{path}")
    damaged = bytearray(whole)
    damaged[150] ^= 255  # inside the first array's values, so that its checksum is wrong
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="that NumPy cannot read"):
        load_source(f"npz:{path}")


def npy(header: dict, data: bytes = b"") -> bytes:
    """Return an .npy file with any header."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


FLOATS = {"descr": "<f4", "fortran_order": False, "shape": (4, 3)}

HOSTILE = {
    "a terabyte": (npy(FLOATS | {"shape": (10**9, 1000)}), r"float32 \[1000000000, 1000\]"),
    "more than there is": (npy(FLOATS, bytes(40)), r"float32 \[4, 3\], in a file of"),
    "less than there is": (npy(FLOATS, bytes(56)), r"float32 \[4, 3\], in a file of"),
    "a negative length": (npy(FLOATS | {"shape": (-1, -12)}, bytes(48)), r"\[-1, -12\]"),
    "objects": (npy(FLOATS | {"descr": "|O"}, b"cos\nsystem\n(S'exit 1'\ntR."), "pickled objects"),
    "another version": (b"\x93NUMPY\x09\x00" + bytes(100), "unknown version"),
    "no array": (b"text", "NumPy cannot read"),
    "a header that is code": (
        b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').getpid()".ljust(32),
        "NumPy cannot read",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_array_is_named_before_memory_is_allocated(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "a.npz"
    save_npz(path)
    members = {key: value for key, value in np.load(path).items() if key != "train_inputs"}
    np.savez(path, **members)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_inputs.npy", content)
    with pytest.raises(DataError, match=message):
        load_source(f"npz:{path}")


def test_a_compressed_file_is_read(tmp_path):
    arrays = np.load(
        save_npz(
            tmp_path / "a.npz",
            train_inputs=np.zeros((4, 50_000)),
            test_inputs=np.zeros((2, 50_000)),
        ).partition(":")[2]
    )
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    assert (tmp_path / "b.npz").stat().st_size < 10_000
    assert load_source(f"npz:{tmp_path / 'b.npz'}").train_values.shape == (4, 50_000)
