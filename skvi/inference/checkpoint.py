"""A file from which a run that was cut goes on."""

import json
import math
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from skvi.inference.gradient import State

# Writing may take this share of a run's time; the first epoch is always written.
_SHARE = 0.05
_FORMAT = "skvi checkpoint 1"


class Checkpoint:
    """One NumPy archive, replaced as a whole: a run that is killed leaves the last whole one.

    It holds arrays and a line of JSON, and is read without ever running code from it.

    Parameters
    ----------
    path : str or path-like
        Written beside itself first, then moved into place.
    identity : dict of str to str
        What the run depends on. A file with another one is refused.

    Attributes
    ----------
    saved : dict of ndarray or None
        What an earlier run wrote last; None if there is no file.

    Raises
    ------
    ValueError
        If the file is no checkpoint, or that of a run with another identity; if it is a folder; if
        its folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, str]) -> None:
        self.path = Path(path)
        self.identity = identity
        if self.path.is_dir():
            raise ValueError(f"checkpoint={str(path)!r} is a folder; name a file in it.")
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._next = -math.inf
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint={str(path)!r}: its folder does not exist; create it.")
        self.saved = self._read()

    def _read(self) -> State | None:
        if not self.path.exists():
            return None
        try:
            # The file is opened here because np.load leaves one that it cannot read open.
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            label = json.loads(str(arrays.pop("label")))
            readable = label.pop("format") == _FORMAT
        except (KeyError, TypeError, ValueError, EOFError, AttributeError, zipfile.BadZipFile):
            readable = False
        if not readable:
            raise ValueError(
                f"checkpoint={str(self.path)!r} is not a checkpoint of this version of skvi. Name "
                "another path, or delete the file."
            )
        names = sorted(label.keys() | self.identity.keys())
        other = [name for name in names if label.get(name) != self.identity.get(name)]
        if other:
            raise ValueError(
                f"checkpoint={str(self.path)!r} was written by another fit: {', '.join(other)} "
                f"differ{'s' if len(other) == 1 else ''}. Restore what has changed to go on with "
                "it; name another path, or delete the file, to begin anew."
            )
        return arrays

    def write(self, arrays: Callable[[], State]) -> None:
        """Write what `arrays` returns, unless the last writing was too short a time ago."""
        since = time.monotonic()
        if since < self._next:
            return
        label = json.dumps({"format": _FORMAT, **self.identity})
        with self._partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **{"label": np.array(label), **arrays()})
            file.flush()
            os.fsync(file.fileno())
        self._partial.replace(self.path)
        now = time.monotonic()
        self._next = now + (now - since) / _SHARE

    def remove(self) -> None:
        """Delete the file, if there is one, and what a cut writing may have left."""
        self.path.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)
