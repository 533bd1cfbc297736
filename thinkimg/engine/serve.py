"""vLLM's server where it computes on a CPU: a process that waits for another sleeps, and keeps no core busy meanwhile.

For a second after each message vLLM's processes look for the next one without a pause (SpinCondition, vLLM 0.32): engine and
worker take a core each from the model, the client and the trainer. On two cores the tiny preset's rollouts took 16 to 34 s
instead of 4 to 5. All processes of a server come here: what starts them imports the main module of its parent.
"""

import time

import vllm
from vllm.distributed.device_communicators import shm_broadcast

PAUSE_S = 1e-4  # between two looks; a step of the smallest model takes milliseconds


def pause() -> None:
    time.sleep(PAUSE_S)


assert vllm.__version__.startswith("0.32.") and hasattr(shm_broadcast, "sched_yield"), "this vLLM waits in another way"
shm_broadcast.sched_yield = pause

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
