"""Device lock: a global concurrency limit of Prefect lets one run at a time use a machine's device.

PREFECT_API_URL=… python -m flows._device     creates the limit, for `make deploy`
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
RETRY_S = 2.0  # between two attempts
TAKE_S = 30.0  # for taking a free slot: a server may be slow, or another run quicker
# The shortest lease that Prefect allows: after a SIGKILL the device stays taken for so long.
LEASE = {"lease_duration": 60, "raise_on_lease_renewal_failure": False}


@contextmanager
def hold_device(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold this machine's device, and wait until it is free; an embedded server shares it with nobody.

    check: called while waiting; its exception ends the wait. The run continues if the server stops answering later: its
    work is worth more than the order of a queue.
    """
    if is_embedded():
        yield
        return
    announced = False
    with ExitStack() as stack:
        while True:
            check()
            limit = ensure_limit()
            if limit.active_slots < limit.limit:  # asked first, as Prefect logs an error for each vain attempt
                try:
                    stack.enter_context(concurrency(LIMIT, timeout_seconds=TAKE_S, strict=True, **LEASE))
                    break
                except TimeoutError:
                    log.debug("another run was quicker to take %s", LIMIT)
            elif not announced:
                console.note(f"waiting for the device, which another run holds (concurrency limit {LIMIT})")
                announced = True
            time.sleep(RETRY_S)
        yield


def ensure_limit():
    """Return the server's limit, created if there is none; an existing size stays, as a user may have two devices."""
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
    limit = ensure_limit()
    print(f"Concurrency limit {limit.name}: {limit.limit}")
