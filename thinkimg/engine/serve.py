"""vLLM's server on a CPU, with processes that sleep while they wait for one another, and an engine that is forked.

For a second after each message vLLM's processes look for the next one without a pause (SpinCondition, vLLM 0.32).
Engine and worker then take a core each from the model, the client and the trainer. On two cores the tiny preset's
rollouts took 16 to 34 s instead of 4 to 5. The worker imports this module, as it is the main module of its parent.

On a CPU vLLM spawns its processes, so that OpenMP reads its cores in the worker. The engine's own process computes
nothing: forked, it imports nothing again, and the server is there in 25 s in place of 35, with 0.6 GB less.
"""

import multiprocessing
import os
import signal
import time
from functools import partial

import vllm
from vllm.distributed.device_communicators import shm_broadcast

from thinkimg.watchdog import PR_SET_PDEATHSIG, prctl

PAUSE_S = 1e-4  # between two polls; a step of the smallest model takes milliseconds


def pause() -> None:
    """Sleep between two polls."""
    time.sleep(PAUSE_S)


assert vllm.__version__.startswith("0.32.") and hasattr(shm_broadcast, "sched_yield"), "this vLLM waits in another way"
shm_broadcast.sched_yield = pause

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main
    from vllm.v1.engine import utils

    utils.get_mp_context = partial(multiprocessing.get_context, "fork")
    # It has our port open, too: who asks a server that was killed would wait for an answer.
    os.register_at_fork(after_in_child=partial(prctl, PR_SET_PDEATHSIG, signal.SIGTERM))
    main()
