"""A tape of torch operations: what a CUDA graph keeps of a step, on a machine without CUDA."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# A device has to be waited for, or copied to, before these can go on.
_HOST = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.lift_fresh.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,
}
_SHAPES = {aten.squeeze_.dim, aten.unsqueeze_.default, aten.t_.default, aten.transpose_.default}


class Tape(TorchDispatchMode):
    """Keeps the operations that run inside, and repeats them on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func in {aten.index.Tensor, aten.index_put_.default} and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        if func in _HOST or by_mask:
            raise AssertionError(f"{func} needs the host in the middle of a step")
        out = func(*args, **kwargs)
        # The optimiser names its step; a shape that changed in place has changed.
        if func.namespace != "profiler" and func not in _SHAPES:
            places = [t if t is None else aten.alias(t) for t in tree_leaves(out)]
            self.calls.append((func, args, kwargs, places))
        return out

    @torch.no_grad()
    def repeat(self):
        """Memory that nobody writes is NaN, so that what the host wrote there is missed."""
        torch.use_deterministic_algorithms(True)
        try:
            self._repeat()
        finally:
            torch.use_deterministic_algorithms(False)

    def _repeat(self):
        for func, args, kwargs, places in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(places, again, strict=True):
                # Views and operations in place have written where they should.
                if old is not None and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


def record(run):
    """Stand in for :func:`skvi.runtime.graph.recorder`: the record runs once where it is made."""
    tape = Tape()
    with tape:
        run()
    has_run = True

    def repeat():
        nonlocal has_run
        if not has_run:
            tape.repeat()
        has_run = False

    return repeat
