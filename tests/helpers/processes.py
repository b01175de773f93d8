"""Processes that tests start and kill, forked from a clean process.

Forks of the test process would share its locks. tqdm has a lock between processes. If a child is killed while it holds
that lock, all later children wait forever.
"""

from __future__ import annotations

import multiprocessing


def fork_server():
    """Return a multiprocessing context with the slow imports preloaded. Its first process takes seconds to start."""
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
    """Run ``function(*arguments)`` in a new process. Return its exit code, or minus the signal that ended it."""
    process = fork_server().Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode
