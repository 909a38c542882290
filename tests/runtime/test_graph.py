"""What is recorded on CUDA, with torch's part of it replaced."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from skvi.runtime.graph import recorder


class _Cuda:
    """Notes what is asked of torch.cuda."""

    def __init__(self, monkeypatch):
        self.log = []
        for name, stand_in in (
            ("CUDAGraph", self._graph),
            ("Stream", lambda device: self._note("stream", device)),
            ("device", lambda device: self._inside("device", device)),
            ("current_stream", lambda device: ("current", device)),
            ("stream", lambda stream: self._inside("stream", stream)),
            ("graph", self._capture),
        ):
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _note(self, *entry):
        self.log.append(entry)
        return entry

    @contextlib.contextmanager
    def _inside(self, *entry):
        self._note("enter", *entry)
        try:
            yield
        finally:
            self._note("exit", *entry)

    def _graph(self):
        self._note("graph")
        return SimpleNamespace(
            register_generator_state=lambda generator: self._note("register", generator),
            replay=lambda: self._note("replay"),
        )

    def _capture(self, graph, *, stream, capture_error_mode):
        return self._inside("capture", stream, capture_error_mode)


def test_the_cpu_records_nothing():
    assert recorder(torch.Generator()) is None


def test_a_graph_is_captured_on_the_device_of_the_generator_and_draws_from_it(monkeypatch):
    cuda = _Cuda(monkeypatch)
    device = torch.device("cuda", 1)
    generator = SimpleNamespace(device=device)
    record = recorder(generator)
    repeats = [record(lambda: cuda._note("run")) for _ in range(2)]
    capture = ("capture", ("stream", device), "thread_local")
    entered = [("enter", "device", device), ("enter", "stream", ("current", device))]
    one = [
        ("graph",),
        ("register", generator),
        ("enter", *capture),
        ("run",),
        ("exit", *capture),
        ("exit", "stream", ("current", device)),
        ("exit", "device", device),
    ]
    assert cuda.log == [*entered, ("stream", device), *one, *entered, *one]
    cuda.log.clear()
    for repeat in repeats:
        repeat()
    assert cuda.log == [("replay",)] * 2


def test_from_the_release_on_that_finds_generators_none_is_registered(monkeypatch):
    cuda = _Cuda(monkeypatch)
    generator = SimpleNamespace(device=torch.device("cuda", 0))
    for release, registers in (("2.13.1", True), ("2.14.0+cu130", False)):
        monkeypatch.setattr(torch, "__version__", release)
        cuda.log.clear()
        recorder(generator)(lambda: None)
        assert (("register", generator) in cuda.log) == registers


def test_one_record_is_made_at_a_time(monkeypatch):
    _Cuda(monkeypatch)
    record = recorder(SimpleNamespace(device=torch.device("cuda", 0)))
    n_inside, most = 0, 0
    entered = threading.Event()

    def run():
        nonlocal n_inside, most
        n_inside += 1
        most = max(most, n_inside)
        entered.wait(0.05)
        n_inside -= 1

    threads = [threading.Thread(target=record, args=(run,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_failure_lets_the_next_one_in_on_the_stream_there_was(monkeypatch):
    cuda = _Cuda(monkeypatch)
    device = torch.device("cuda", 0)
    record = recorder(SimpleNamespace(device=device))

    def fail():
        raise RuntimeError("cannot be captured")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            record(fail)
        assert cuda.log[-2:] == [
            ("exit", "stream", ("current", device)),
            ("exit", "device", device),
        ]


def test_releases_whose_failed_captures_spoil_the_generator_record_nothing(monkeypatch):
    _Cuda(monkeypatch)
    generator = SimpleNamespace(device=torch.device("cuda", 0))
    for release, records in (("2.12.1+cu130", False), ("2.13.0", True), ("3.0.0a0+git1", True)):
        monkeypatch.setattr(torch, "__version__", release)
        assert (recorder(generator) is not None) == records
