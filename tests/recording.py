"""A tape of torch operations: what a CUDA graph keeps of a step, on a machine without CUDA."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# A device has to be waited for, or copied to, before these can go on.
_HOST = {
    aten._linalg_check_errors.default,
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.equal.default,
    aten.histc.default,
    aten.is_nonzero.default,
    aten.lift_fresh.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_SHAPES = {aten.squeeze_.dim, aten.unsqueeze_.default, aten.t_.default, aten.transpose_.default}
# On a CPU these leave no trace among the operations.
_TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}
# These make tensors of the CPU unless they are told where.
_FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand,
    torch.randn, torch.randperm, torch.scalar_tensor, torch.tril_indices, torch.triu_indices,
    torch.zeros,
}  # fmt: skip


def _refuse(what):
    raise AssertionError(f"{what} needs the host in the middle of a step")


class _Calls(TorchFunctionMode):
    """Sees what is asked of torch before it becomes operations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _TO_HOST or (func in _FACTORIES and kwargs.get("device") is None):
            _refuse(func)
        return func(*args, **kwargs)


class Tape(TorchDispatchMode):
    """Keeps the operations that run inside, and repeats them on the same memory.

    All chance must come from `generator`.
    """

    def __init__(self, generator):
        super().__init__()
        self.generator = generator
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func in _INDEX and any(
            i is not None and i.dtype in {torch.bool, torch.uint8} for i in args[1]
        )
        if func in _HOST or by_mask:
            _refuse(func)
        if torch.Tag.nondeterministic_seeded in func.tags:
            drawn_from = kwargs.get("generator")
            is_own = drawn_from is not None and drawn_from._cdata == self.generator._cdata
            assert is_own, f"{func} has another generator"
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


def recorder(generator):
    """Stand in for :func:`skvi.runtime.graph.recorder`: a record runs once where it is made."""

    def record(run):
        tape = Tape(generator)
        with _Calls(), tape:
            run()
        has_run = True

        def repeat():
            nonlocal has_run
            if not has_run:
                tape.repeat()
            has_run = False

        return repeat

    return record
