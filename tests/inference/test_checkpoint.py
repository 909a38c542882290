"""The checkpoint file: whole or absent, and only for the run that wrote it."""

import numpy as np
import pytest

from skvi.inference import checkpoint as module
from skvi.inference.checkpoint import Checkpoint

ARRAYS = {"a/0": np.arange(6.0).reshape(2, 3), "count": np.array(7), "none": np.empty(0)}


def test_what_was_written_is_read_again(tmp_path):
    first = Checkpoint(tmp_path / "file", {"X": "abc"})
    assert first.saved is None
    first.write(lambda: ARRAYS)
    saved = Checkpoint(str(tmp_path / "file"), {"X": "abc"}).saved
    assert saved.keys() == ARRAYS.keys()
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(saved[name], value)
        assert saved[name].dtype == value.dtype
    first.remove()
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_run_is_refused_by_name(tmp_path):
    Checkpoint(tmp_path / "file", {"X": "abc", "beta": "1.0"}).write(lambda: ARRAYS)
    with pytest.raises(ValueError, match=r"another fit: beta differs\. Restore"):
        Checkpoint(tmp_path / "file", {"X": "abc", "beta": "2.0"})
    with pytest.raises(ValueError, match="another fit: X, beta differ"):
        Checkpoint(tmp_path / "file", {"X": "abd"})
    with pytest.raises(ValueError, match="another fit: gamma differs"):
        Checkpoint(tmp_path / "file", {"X": "abc", "beta": "1.0", "gamma": "0"})


@pytest.mark.parametrize("stop_at", ["savez", "fsync"])
def test_a_writing_that_is_cut_leaves_the_one_before(tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(module, "_SHARE", np.inf)
    keeper = Checkpoint(tmp_path / "file", {})
    keeper.write(lambda: {"epoch": np.array(1)})

    def cut(file, *args, **kwargs):
        if stop_at == "savez":
            file.write(b"half of a ")
        raise KeyboardInterrupt

    monkeypatch.setattr(*((np, "savez") if stop_at == "savez" else (module.os, "fsync")), cut)
    with pytest.raises(KeyboardInterrupt):
        keeper.write(lambda: {"epoch": np.array(2)})
    monkeypatch.undo()
    assert int(Checkpoint(tmp_path / "file", {}).saved["epoch"]) == 1
    keeper.remove()
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    keeper = Checkpoint(tmp_path / "file", {})
    written = []

    def arrays():
        nonlocal now
        now += 0.5  # what a writing takes
        written.append(now)
        return ARRAYS

    for _ in range(1000):
        keeper.write(arrays)
        now += 0.1
    assert 8 <= len(written) <= 12
    assert written[0] == 0.5


def test_a_file_that_holds_code_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (pytest.fail, ("the file was executed",))

    np.savez(tmp_path / "file.npz", label=np.array([Harmful()], dtype=object))
    with pytest.raises(ValueError, match="not a checkpoint"):
        Checkpoint(tmp_path / "file.npz", {})


def test_a_folder_is_no_place_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, "", "/"):
        with pytest.raises(ValueError, match="is a folder; name a file in it"):
            Checkpoint(path, {})
