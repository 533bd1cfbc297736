"""The flow of this project: Prefect's, with a server of its own where no API is configured."""

from collections.abc import Callable
from functools import partial

import prefect

from flows import _server


class Flow(prefect.Flow):
    """As Prefect's, and works without any configuration."""

    def __call__(self, *arguments, **options):
        _server.use()
        return super().__call__(*arguments, **options)


def flow(name: str) -> Callable[[Callable], Flow]:
    """Decorator that makes a flow of a function."""
    return partial(Flow, name=name)
