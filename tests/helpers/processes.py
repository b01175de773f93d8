"""Processes that tests start and kill: forked from a clean one.

Forks of the tests' own process share its locks. tqdm's is one between processes: a child that was killed while it held
that lock left every later one waiting for ever.
"""

from __future__ import annotations

import multiprocessing


def fork_server():
    """A multiprocessing context whose processes have the slow imports done. The first call's process takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "jasper_fast.train",
            "jasper_fast.training.finish",
            "datasets",
            "sentence_transformers",
            "torch.distributed.fsdp",
        ]
    )
    return context


def exit_code(function, *arguments) -> int:
    """Run ``function(*arguments)`` in a process of its own; its exit code, or minus the signal that ended it."""
    process = fork_server().Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode
