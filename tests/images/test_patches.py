"""The patches that a picture becomes are those of transformers' image processor, for every family's constants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.images.patches import TEMPORAL, ImageProcessor
from thinkimg.images.settings import PixelLimits, ViewLimits
from thinkimg.images.view import resize_to_view
from thinkimg.models.family import list_families

PROCESSORS = {name: family.processor for name, family in list_families().items()} | {
    "made_up": ImageProcessor(patch=10, merge=3, mean=(0.1, 0.5, 0.7), std=(0.9, 0.3, 0.2))
}
SMALL = PixelLimits(min_pixels=70 * 70, max_pixels=150 * 150)


@pytest.fixture(scope="module")
def reference():
    """Return transformers' processor with the constants of one of ours."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    def make(ours: ImageProcessor):
        return Qwen2VLImageProcessorPil(
            patch_size=ours.patch,
            merge_size=ours.merge,
            temporal_patch_size=TEMPORAL,
            image_mean=list(ours.mean),
            image_std=list(ours.std),
            size={"shortest_edge": SMALL.min_pixels, "longest_edge": SMALL.max_pixels},
        )

    return make


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=12, deadline=None)
@given(width=st.integers(20, 400), height=st.integers(20, 400), seed=st.integers(0, 2**32 - 1))
def test_patches_of_a_view_are_those_of_the_image_processor(reference, name, width, height, seed):
    ours = PROCESSORS[name]
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = reference(ours)(picture, return_tensors="np")
    limits = ViewLimits.of(SMALL, ours)
    view = resize_to_view(picture, limits)
    patches = ours.extract_patches(view)
    assert expected["image_grid_thw"].tolist() == [list(limits.count_patches(view.size))]
    assert patches.dtype == np.float32 and patches.shape[1] == ours.patch_values
    assert patches.tobytes() == expected["pixel_values"].tobytes()


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_picture_beside_the_grid_is_refused(name):
    ours = PROCESSORS[name]
    with pytest.raises(AssertionError, match="no multiple"):
        ours.extract_patches(Image.new("RGB", (ours.token_side + ours.patch, ours.token_side)))
