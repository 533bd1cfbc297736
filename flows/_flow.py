"""The flow of this project: Prefect's, with a server of its own where no API is configured."""

from collections.abc import Callable
from functools import partial

import flows._environment  # noqa: F401

import prefect
from prefect.exceptions import MissingResult

from flows import _server


class Flow(prefect.Flow):
    """Prefect's flow, working without any configuration.

    It is run once more where Prefect has lost its result, for by then what it makes is found in the store: a server that
    answers too late is told of the end a second time, refuses it, and hands back the state that it has, without the data
    (seen with 3.7 on a machine whose cores were all busy).
    """

    def __call__(self, *arguments, **options):
        _server.use()
        try:
            return super().__call__(*arguments, **options)
        except MissingResult:
            return super().__call__(*arguments, **options)


def flow(name: str) -> Callable[[Callable], Flow]:
    """Decorator that makes a flow of a function."""
    return partial(Flow, name=name)
