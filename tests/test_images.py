"""One image file: its pixels as RGB."""

import numpy as np
from PIL import Image

from tests.helpers.folders import save
from utils.images import read_image


def test_grey_of_sixteen_and_of_thirty_two_bits_keeps_its_levels(tmp_path):
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    got = np.array(read_image(save(Image.fromarray(grey), tmp_path, "a.png")))
    np.testing.assert_allclose(got, np.repeat(grey[..., None] / 257, 3, axis=2), atol=1)
    for level, expected in ((200, 200), (51400, 200), (70000, 255)):  # bytes, or sixteen bits
        path = save(Image.new("I", (4, 4), level), tmp_path, "a.tiff")
        assert set(np.array(read_image(path)).ravel()) == {expected}
