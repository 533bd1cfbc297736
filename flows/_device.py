"""One run at a time on a machine's device: a global concurrency limit that whoever needs it creates.

PREFECT_API_URL=… python -m flows._device     creates it, for `make deploy`
"""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import flows._environment  # noqa: F401

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows._server import is_embedded
from thinkimg import console

log = logging.getLogger(__name__)

LIMIT = f"thinkimg-device-{socket.gethostname()}"
POLL_S = 2.0  # between two looks of who waits
TAKE_S = 30.0  # for taking what is free: on a slow server, or where another run is quicker
# The shortest that Prefect allows: so long the device stays taken after a SIGKILL.
LEASE = {"lease_duration": 60, "raise_on_lease_renewal_failure": False}


@contextmanager
def device(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold this machine's device, waiting for whoever has it; without a shared server there is nobody to share with.

    check: called while it waits; what it raises ends the waiting. A server that does not answer later on does not end the
    run: what it does is worth more than the order of a queue.
    """
    if is_embedded():
        yield
        return
    announced = False
    with ExitStack() as stack:
        while True:
            check()
            limit = create()
            if limit.active_slots < limit.limit:  # asked first, as Prefect logs an error for each attempt in vain
                try:
                    stack.enter_context(concurrency(LIMIT, timeout_seconds=TAKE_S, strict=True, **LEASE))
                    break
                except TimeoutError:
                    log.debug("another run was quicker to take %s", LIMIT)
            elif not announced:
                console.say(f"waiting for the device: another run holds the concurrency limit {LIMIT}")
                announced = True
            time.sleep(POLL_S)
        yield


def create():
    """The limit as the server has it, made if there is none; its size is left alone, so that two devices can be told."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
            except ObjectAlreadyExists:
                log.debug("another run created %s in the meantime", LIMIT)
            return client.read_global_concurrency_limit_by_name(LIMIT)


if __name__ == "__main__":
    limit = create()
    print(f"Concurrency limit {limit.name}: {limit.limit}")
