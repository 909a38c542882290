"""A device that holds its numbers in main memory and refuses what a GPU would refuse.

For tests where there is no GPU: operations on tensors of two devices, NumPy's view of a tensor that
lies elsewhere, and a generator of another device are errors. The kernels are those of the CPU, so
that results can be compared with the CPU's to rounding. Operations that a GPU lacks, and the order
of its work, are not emulated; nor does it refuse a single number of the host's everywhere that a
GPU does (not as the other end of `lerp`, say).
"""

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from skvi.runtime import blocks
from skvi.runtime.device import resolve_device
from skvi.runtime.random import make_generator

# A name that torch knows without hardware behind it, and whose gradients it computes in this
# thread; nothing else in skvi computes with tensors of that name.
DEVICE = torch.device("meta")
CPU = torch.device("cpu")

aten = torch.ops.aten
# A GPU reads single numbers of the host's, but not in these operations.
_NO_HOST_NUMBERS = {
    aten.addmm, aten.baddbmm, aten.cat, aten.gather, aten.index_add, aten.index_add_,
    aten.index_fill, aten.index_fill_, aten.index_select, aten.masked_fill, aten.masked_fill_,
    aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.stack,
}  # fmt: skip
# Positions may lie on the host.
_INDEXING = {aten.index, aten.index_put, aten.index_put_}


class Elsewhere(Tensor):
    """A tensor of the device; `numbers` is what the CPU computes with."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=DEVICE,
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError("The numbers of a tensor of this device cannot be replaced.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func}: this tensor has outlived its device.")


def _here(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.numbers
    if isinstance(value, list | tuple):
        return type(value)(_here(v) for v in value)
    return value


def _there(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, Elsewhere):
        return Elsewhere(value)
    if isinstance(value, list | tuple):
        return type(value)(_there(v) for v in value)
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether what `func` returns shares memory with what it is given."""
    return any(argument.alias_info is not None for argument in func._schema.returns)


class EmulatedDevice(TorchDispatchMode):
    """While it is entered, tensors of `DEVICE` have numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        every = (*args, *kwargs.values())
        tensors = list(_tensors(every))
        away = any(isinstance(t, Elsewhere) for t in tensors)
        named = kwargs.get("device")
        leaves = away if named is None else named.type == DEVICE.type
        generator = next((v for v in every if isinstance(v, torch.Generator)), None)
        if generator is not None and leaves != (generator._cdata in EmulatedGenerator.known):
            raise RuntimeError(f"{func}: a generator of another device.")
        if not away and not leaves:
            return func(*args, **kwargs)

        packet = func.overloadpacket
        if packet is aten.copy_:
            func(*_here(args), **kwargs)
            return args[0]
        if packet is not aten._to_copy:
            self._refuse_two_devices(func, args, kwargs, tensors)
        options = {name: _here(value) for name, value in kwargs.items()}
        if named is not None:
            options["device"] = CPU
        out = func(*_here(args), **options)
        if not leaves:
            return out
        if named is None and _aliases(func):
            return return_and_correct_aliasing(func, args, kwargs, _there(out))
        return _there(out)

    @staticmethod
    def _refuse_two_devices(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        packet = func.overloadpacket
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        written = [named.get(a.name) for a in func._schema.arguments if a.is_write]
        written = [id(t) for t in _tensors(written)]
        positions = [id(t) for t in _tensors(args[1:2])] if packet in _INDEXING else []
        for t in tensors:
            number = t.dim() == 0 and packet not in _NO_HOST_NUMBERS and id(t) not in written
            position = isinstance(args[0], Elsewhere) and id(t) in positions
            if not (isinstance(t, Elsewhere) or number or position):
                places = [(type(t).__name__, *t.shape) for t in tensors]
                raise RuntimeError(f"{func}: tensors of two devices: {places}")


class EmulatedGenerator(torch.Generator):
    """A generator of the device, whose numbers are those of the CPU."""

    # Operations are given an object of the parent's class, with this address.
    known: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        self.known.add(self._cdata)

    def __del__(self) -> None:
        self.known.discard(self._cdata)

    @property
    def device(self) -> torch.device:
        return DEVICE


@contextmanager
def emulated_device() -> Iterator[None]:
    """While this lasts, ``device="meta"`` is a device of skvi's."""

    def resolve(device: Any, data: object = None) -> torch.device:
        if device == "auto" and isinstance(data, Elsewhere):
            return DEVICE
        return DEVICE if str(device) == str(DEVICE) else resolve_device(device, data)

    def make(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
        if torch.device(device) != DEVICE:
            return make_generator(seed, device)
        return EmulatedGenerator().manual_seed(seed)

    def keeping_numbers(factory: Any) -> Any:
        # torch itself knows that there is no memory under that name, and asks no mode.
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            tensor = factory(*args, **kwargs)
            return tensor if device is None else tensor.to(device)

        return made

    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, EmulatedDevice():
        for module in [m for name, m in sys.modules.items() if name.startswith("skvi.")]:
            for name, value in (("resolve_device", resolve), ("make_generator", make)):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        patch.setitem(blocks._WORKSPACE_BYTES, DEVICE.type, 1 << 14)
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, keeping_numbers(getattr(torch, name)))
        # It asks whether the device is one of those with a fused Adam; the kernel is the CPU's.
        adam = importlib.import_module("torch.optim.adam")
        patch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)
        # Modules would move by changing what a tensor is, which its numbers cannot follow.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(replaced)
