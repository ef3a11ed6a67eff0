"""Buckets have one area, sides the networks can take, and at 1024 px SDXL's own sizes."""

import pytest

from diffusion_kd import errors
from training.preparation import buckets

# Podell et al. 2023, appendix I: the wide half of the table, height then width.
SDXL = {
    *((1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408), (704, 1472)),
    *((640, 1536), (640, 1600), (576, 1664), (576, 1728), (576, 1792), (512, 1856), (512, 1920), (512, 1984)),
    (512, 2048),
}


def test_at_1024_px_they_are_those_of_sdxl() -> None:
    table = buckets.build("aspect", 1024, 32).sizes_px
    assert {size for size in table if size[0] <= size[1]} == SDXL
    assert {size[::-1] for size in table} == set(table)


@pytest.mark.parametrize(("size_px", "multiple_px"), [(64, 16), (512, 32), (768, 32), (1024, 64), (16, 4)])
def test_every_side_is_a_multiple_and_no_area_is_larger(size_px: int, multiple_px: int) -> None:
    table = buckets.build("aspect", size_px, multiple_px).sizes_px
    assert (size_px, size_px) in table and len(table) > 2
    for height, width in table:
        assert height % multiple_px == 0 and width % multiple_px == 0
        assert 0.5 * size_px**2 <= height * width <= size_px**2
        assert max(height, width) <= 4 * min(height, width)


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [(3000, 3000, (1024, 1024)), (1080, 1920, (768, 1344)), (1920, 1080, (1344, 768)), (10, 4000, (512, 2048))],
)
def test_a_picture_goes_where_its_shape_is_nearest(height: int, width: int, bucket: tuple[int, int]) -> None:
    assert buckets.build("aspect", 1024, 32).nearest(height, width) == bucket
    assert buckets.build("square", 1024, 32).nearest(height, width) == (1024, 1024)


def test_sizes_that_no_network_takes_are_refused() -> None:
    with pytest.raises(errors.ConfigError, match="size_px is 1000; it must be a multiple of 32"):
        buckets.build("square", 1000, 32)
    with pytest.raises(errors.ConfigError, match="square or aspect"):
        buckets.build("round", 1024, 32)
