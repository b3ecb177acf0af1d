import numpy as np
import pytest

from lit_rebasin.merging.npz_file import read_npz


@pytest.mark.parametrize(
    ("dtype", "read"),
    [(">f4", "float32"), (">i2", "int16"), ("longdouble", "float64"), ("float16", "float16"), ("bool", "bool")],
)
def test_arrays_are_as_this_machine_and_torch_hold_them(tmp_path, dtype, read):
    x = np.array([[0, 1], [1, 0]]).astype(dtype)
    np.savez(tmp_path / "a.npz", x=x, other=np.array(["words"]))
    found, names = read_npz(str(tmp_path / "a.npz"), ("x", "y"))
    assert names == ["x", "other"]
    assert list(found) == ["x"]
    assert found["x"].dtype == np.dtype(read)
    assert found["x"].dtype.isnative
    np.testing.assert_array_equal(found["x"], x.astype(read))


def test_one_array_is_no_archive(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"a.npy is not a readable .npz of numbers: it holds one array without a name"):
        read_npz(str(tmp_path / "a.npy"), ("x",))
