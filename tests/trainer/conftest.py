"""Fixtures of the trainer's tests: a tiny base of each family."""

import functools
from collections.abc import Callable

import pytest
from grpo_world import shape_of

from thinkimg.models.base import Base
from thinkimg.models.tiny import create_tiny


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], Base]:
    """Return the tiny base of a family by its name, made once."""

    @functools.cache
    def make(family: str) -> Base:
        directory = tmp_path_factory.mktemp("family") / family
        create_tiny(directory, shape_of(family), ["crop the image", "answer"], seed=0)
        return Base("tiny", directory=str(directory))

    return make
