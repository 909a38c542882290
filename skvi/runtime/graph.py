"""Work of a device that is recorded once and repeated as a whole."""

from collections.abc import Callable

import torch

# Makes the function that it is given known to the device, which may or may not run it, and returns
# what runs it: the same operations on the same memory, without the function's Python.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]


def recorder(generator: torch.Generator) -> Recorder | None:
    """Return what records work on the device of `generator`; None where nothing can.

    A CUDA graph is one launch instead of hundreds, each of which takes the host longer than the
    device takes for a small operation. What is recorded must not wait for the device, nor copy
    from the host; it reads and writes tensors that stay where they are, and draws from `generator`.

    Parameters
    ----------
    generator : torch.Generator
        Goes on from where it is in every repetition.
    """
    device = generator.device
    if device.type != "cuda":
        return None

    def record(run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            run()
        return graph.replay

    return record
