"""A data set of a fork's own reads through ``as_mxnet`` what it read through mxnet."""

import numbers
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_kd.data import as_mxnet as mx
from arcface_kd.data.as_mxnet import ndarray as nd
from arcface_kd.data.pack import write_identities
from arcface_kd.errors import ConfigError


@pytest.fixture
def encoded() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def test_records_as_the_host_s_data_set_reads_them(tmp_path: Path, encoded: bytes) -> None:
    write_identities(tmp_path, [1, 2], [encoded] * 3)
    records = mx.recordio.MXIndexedRecordIO(str(tmp_path / "train.idx"), str(tmp_path / "train.rec"), "r")
    header, _ = mx.recordio.unpack(records.read_idx(0))
    assert header.flag > 0
    assert int(header.label[0]) == 4
    labels = []
    for key in range(1, 4):
        header, image = mx.recordio.unpack(records.read_idx(key))
        labels.append(header.label if isinstance(header.label, numbers.Number) else header.label[0])
        assert image == encoded
    assert labels == [0, 1, 1]
    assert records.keys[:4] == [0, 1, 2, 3]
    records.close()
    with pytest.raises(ConfigError, match="flag='w'"):
        mx.recordio.MXIndexedRecordIO("a.idx", "a.rec", "w")


def test_pixels_as_the_host_s_verification_reads_them(encoded: bytes) -> None:
    wanted = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    image = mx.image.imdecode(encoded)
    np.testing.assert_array_equal(image.asnumpy(), wanted[..., ::-1])
    np.testing.assert_array_equal(mx.image.imdecode(encoded, to_rgb=False).asnumpy(), wanted)
    assert mx.image.resize_short(image, 10).shape == (10, 12, 3)
    rows = nd.transpose(image, axes=(2, 0, 1))
    assert type(rows.asnumpy()) is np.ndarray
    np.testing.assert_array_equal(
        mx.ndarray.flip(data=rows, axis=2).asnumpy(), wanted.transpose(2, 0, 1)[::-1, :, ::-1]
    )
