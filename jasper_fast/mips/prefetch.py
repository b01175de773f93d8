"""Chunks of host rows on a device: the next chunk is copied during the search of the current one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def chunks(rows: Tensor, step: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, up to ``step`` rows on the device), in order.

    On CUDA two buffers alternate. A yielded chunk is overwritten when the chunk after the next one is requested.

    Args:
        rows: (N, D) rows on any device, memory-mapped or not.
        step: maximum number of rows in a chunk.
        device: destination device.
    """
    if device.type != "cuda" or rows.device.type != "cpu":
        for start in range(0, len(rows), step):
            yield start, rows[start : start + step].to(device)
        return
    step = min(step, len(rows))
    staged = [torch.empty(step, rows.shape[1], dtype=rows.dtype, pin_memory=True) for _ in range(2)]
    buffers = [torch.empty(step, rows.shape[1], dtype=rows.dtype, device=device) for _ in range(2)]
    copying = torch.cuda.Stream(device)
    for buffer in buffers:  # An aborted search must not free this memory during a copy.
        buffer.record_stream(copying)
    arrived = [torch.cuda.Event() for _ in range(2)]
    searched = [torch.cuda.Event() for _ in range(2)]

    def send(start: int) -> None:
        turn = start // step % 2
        part = rows[start : start + step]
        arrived[turn].synchronize()  # The last copy out of this pinned buffer has finished.
        staged[turn][: len(part)].copy_(part)
        copying.wait_event(searched[turn])
        with torch.cuda.stream(copying):
            buffers[turn][: len(part)].copy_(staged[turn][: len(part)], non_blocking=True)
            arrived[turn].record(copying)

    copying.wait_stream(torch.cuda.current_stream(device))  # Earlier work there may still use the buffers' memory.
    send(0)
    for start in range(0, len(rows), step):
        turn = start // step % 2
        if start + step < len(rows):
            send(start + step)
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(arrived[turn])
        yield start, buffers[turn][: min(step, len(rows) - start)]
        searched[turn].record(torch.cuda.current_stream(device))
