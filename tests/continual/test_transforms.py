"""Transforms of whole batches."""

import pytest
import torch
from torchvision.transforms.v2.functional import crop, pad

from lit_rebasin.continual.transforms import RandomShift


@pytest.mark.parametrize(("shape", "pixels"), [((40, 1, 8, 8), 1), ((60, 3, 6, 9), 2)])
def test_every_image_is_a_crop_of_its_own_out_of_the_padded_one(shape, pixels):
    torch.manual_seed(0)
    images = torch.randn(shape)
    height, width = shape[2:]
    drawn = set()
    for image, moved in zip(images, RandomShift(pixels)(images), strict=True):
        padded = pad(image, [pixels] * 4, padding_mode="edge")
        places = [(top, left) for top in range(2 * pixels + 1) for left in range(2 * pixels + 1)]
        same = [place for place in places if torch.equal(crop(padded, *place, height, width), moved)]
        assert len(same) == 1
        drawn.add(same[0])
    assert len(drawn) > (2 * pixels + 1) ** 2 / 2


def test_no_pixels_are_refused():
    with pytest.raises(ValueError, match="pixels"):
        RandomShift(0)
