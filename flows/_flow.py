"""Prefect's flow with an API of our own where none is configured."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flows._environment  # noqa: F401

import prefect
from prefect.exceptions import MissingResult

from flows import _server


class Flow(prefect.Flow):
    """Prefect's flow that needs no configuration, and runs again if Prefect loses its result.

    A server that answers too late refuses the repeated report of the end, and returns a state without data (seen
    with Prefect 3.7 on a busy machine). The second run finds the artifact in the store.
    """

    def __call__(self, *arguments, **options):
        _server.use_server()
        try:
            return super().__call__(*arguments, **options)
        except MissingResult:
            return super().__call__(*arguments, **options)


def flow(name: str, **options: Any) -> Callable[[Callable], Flow]:
    """Return a decorator that makes a flow of a function. options: those of Prefect's flow."""
    return partial(Flow, name=name, **options)
