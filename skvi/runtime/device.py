"""Where a computation runs."""

import torch


def resolve_device(device: str | torch.device, data: object = None) -> torch.device:
    """Turn the ``device`` parameter of an estimator into a device that exists.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"``: the device of `data` if it is a tensor, else CUDA if there is one, else the
        CPU. Anything else names a device explicitly and is never replaced by another one.
    data : object, optional
        The input of the call; only looked at if it is a ``torch.Tensor``.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        If an explicit device is unknown to torch or missing on this machine.
    """
    if device == "auto":
        if isinstance(data, torch.Tensor):
            return data.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is not a device that torch knows; "
            'use "auto", "cpu", "cuda" or "cuda:<index>".'
        ) from error
    if resolved.type not in {"cpu", "cuda"}:
        raise ValueError(
            f"device={device!r} is not supported: skvi decides bounds in float64 and is tested "
            'on "cpu" and "cuda" only.'
        )
    if resolved.type == "cuda":
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= n_devices:
            raise ValueError(
                f"device={device!r} was asked for, but torch sees {n_devices} CUDA device(s) on "
                'this machine; use device="auto" or "cpu", or install a CUDA build of torch.'
            )
    return resolved


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices itself, and does not convert them first."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # it says so of the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    # Releases of torch that cannot say what the processor has count as a no.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def asks_freely(device: torch.device) -> bool:
    """Whether the host may look at a value of `device` without waiting for it."""
    return device.type == "cpu"
