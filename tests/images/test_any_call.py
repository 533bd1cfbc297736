"""Whatever a model writes, `run_tool` gives an image, a text or an error, and never raises."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkimg.images.settings import ViewLimits
from thinkimg.images.toolbox import load_tools, run_tool
from thinkimg.images.view import view_size
from thinkimg.records import Coordinates

FEW = ViewLimits(min_pixels=56 * 56, max_pixels=200 * 28 * 28)
ARGUMENTS = {name: [*tool.Args.model_fields.keys() - {"image"}] for name, tool in load_tools().items()}


def see(image):
    """A view of few pixels, so that full resolution is three to four times as fine."""
    return view_size(*image.size, FEW)


def noise(width, height):
    rng = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5000),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0, 5e-324]),
    st.floats(),
    st.floats(0, 300),
    st.text(st.characters(codec=None), max_size=8),  # with lone surrogates, which json.loads lets through
    st.sampled_from(["original", "current", "horizontal", "vertical", "12", "true"]),
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
)
argument_names = sorted({argument for arguments in ARGUMENTS.values() for argument in arguments} | {"image"})


@st.composite
def calls(draw):
    """A tool with mostly its own arguments, of values of any kind."""
    name = draw(st.sampled_from(sorted(ARGUMENTS)))
    args = {argument: draw(scalars | json_values) for argument in sorted(ARGUMENTS[name]) if draw(st.integers(0, 9))}
    extra = draw(st.dictionaries(st.sampled_from(argument_names) | st.text(max_size=5), json_values, max_size=1))
    return name, args | (extra if draw(st.integers(0, 3)) == 0 else {})


IMAGES = [noise(60, 45), noise(1, 1), noise(3, 600), noise(45, 60)]


@given(
    calls() | st.tuples(json_values, json_values),
    st.sampled_from([None, (), ("flip_image",)]),
    st.sampled_from(Coordinates),
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_run_never_raises(name_and_args, offered, unit):
    tools = load_tools(offered if len(repr(name_and_args)) % 3 == 0 else None)
    result = run_tool(*name_and_args, IMAGES, see, tools, unit)
    assert [result.image is not None, bool(result.text), result.error is not None].count(True) == 1
    assert 0 <= result.source < len(IMAGES)
    if result.error is not None:
        assert 0 < len(result.error) < 400
        result.error.encode()
    if result.image is not None:
        assert result.image.mode == "RGB" and max(result.image.size) <= 200 * min(result.image.size)
