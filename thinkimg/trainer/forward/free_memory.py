"""Memory of a device that this process can still take."""

import psutil
import torch


def measure_free(device: torch.device) -> int:
    """Return the free bytes of a GPU, with those that torch's allocator holds and does not use; or of main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
