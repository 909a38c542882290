"""Work of a device that is recorded once and repeated as a whole."""

import threading
from collections.abc import Callable

import torch

# Makes the function that it is given known to the device, which may or may not run it, and returns
# what runs it: the same operations on the same memory, without the function's Python.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]

# Before this release a capture that failed left a generator that could not draw any more.
_FIRST_SAFE_RELEASE = (2, 13)
# From this one on a graph finds the generators that are used in it.
_REGISTERS_ITSELF = (2, 14)
# A process may make one record at a time.
_lock = threading.Lock()


def recorder(generator: torch.Generator) -> Recorder | None:
    """Return what records work on the device of `generator`; None where nothing can.

    A CUDA graph is one launch instead of hundreds, each of which takes the host longer than the
    device takes for a small operation. What is recorded must not wait for the device, nor copy
    from the host; it reads and writes tensors that stay where they are, and draws from `generator`.

    Parameters
    ----------
    generator : torch.Generator
        Goes on from where it is in every repetition.

    Returns
    -------
    Recorder or None
        Raises RuntimeError for work that cannot be recorded.
    """
    device = generator.device
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if device.type != "cuda" or release < _FIRST_SAFE_RELEASE:
        return None
    # Taken when the first record is made. torch deals few of them, in turns, and a graph that goes
    # takes the workspaces of its stream with it (pytorch issue 193402): most fits need none.
    streams: list[torch.cuda.Stream] = []

    def record(run: Callable[[], None]) -> Callable[[], None]:
        # A capture that fails leaves its stream the current one; the one there was is put back.
        before = torch.cuda.stream(torch.cuda.current_stream(device))
        with _lock, torch.cuda.device(device), before:
            if not streams:
                streams.append(torch.cuda.Stream(device))
            graph = torch.cuda.CUDAGraph()
            if release < _REGISTERS_ITSELF:
                graph.register_generator_state(generator)
            # Other threads may go on allocating, and waiting for streams of their own.
            with torch.cuda.graph(graph, stream=streams[0], capture_error_mode="thread_local"):
                run()
        return graph.replay

    return record
