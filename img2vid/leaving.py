"""How a process that is one of several ends: not before the threads that talk to the others are done."""

from __future__ import annotations

import gc
import time

import torch.distributed as dist


def leave_processes() -> None:
    """The last thing a process of several does. Lightning leaves groups of NCCL by itself, those of gloo not.

    gloo's threads let go of the last message's tensors after whoever waited for it went on. If the interpreter has
    ended by then, they abort the process, and torchrun calls the run failed: one in ten on two busy cores.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # whoever still holds the group, as DDP does, goes, and the group's threads with it
        time.sleep(0.2)  # where the group is kept, as a mesh of devices keeps it, its threads have time to finish
