"""Stage times: wall time on the CPU; on CUDA, events that are read only once the device has passed them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from metok_vllm.contract.counters import TIMED_PARTS
from metok_vllm.worker import timing
from metok_vllm.worker.timing import PartTimes


def total(times: PartTimes, stage: str) -> tuple[int, float]:
    snapshot = times.snapshot()[stage]
    return sum(snapshot["counts"]), snapshot["sum"]


def test_wall_time_on_the_cpu() -> None:
    times = PartTimes("cpu")
    for _ in range(3):
        with times.part("shallow"):
            time.sleep(0.01)
    count, seconds = total(times, "shallow")
    assert count == 3
    assert 0.03 <= seconds < 3
    assert [total(times, stage) for stage in TIMED_PARTS if stage != "shallow"] == [(0, 0)] * (len(TIMED_PARTS) - 1)


def test_parts_may_stand_inside_one_another() -> None:
    times = PartTimes()
    with times.part("deep"), times.part("scoring"):
        pass
    assert (total(times, "deep")[0], total(times, "scoring")[0]) == (1, 1)


def test_an_unknown_part_is_an_error() -> None:
    with pytest.raises(KeyError), PartTimes().part("no such stage"):
        pass


def test_what_failed_is_not_counted() -> None:
    times = PartTimes()
    with pytest.raises(RuntimeError), times.part("tower"):
        raise RuntimeError
    assert total(times, "tower") == (0, 0)


class Device:
    """Stands for a CUDA stream: `now` advances when the test says so,
    and an event is over when `now` has reached it.
    """

    def __init__(self) -> None:
        self.enqueued = 0.0
        self.now = 0.0
        self.events = 0
        self.capturing = False

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        self.events += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = -1.0

    def record(self) -> None:
        assert not self.device.capturing, "an event in a captured graph"
        self.at = self.device.enqueued

    def query(self) -> bool:
        return self.device.now >= self.at

    def elapsed_time(self, end: Event) -> float:
        assert self.query(), "waits for the device"
        assert end.query(), "waits for the device"
        return end.at - self.at  # milliseconds


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    return fake


def test_events_are_read_only_when_the_device_has_passed_them(device: Device) -> None:
    times = PartTimes("cuda")
    for milliseconds in (4.0, 8.0):
        with times.part("deep"):
            device.enqueued += milliseconds
    assert total(times, "deep") == (0, 0)
    device.now = 5.0
    assert total(times, "deep") == (1, pytest.approx(0.004))
    device.now = 100.0
    assert total(times, "deep") == (2, pytest.approx(0.012))


def test_events_are_used_again(device: Device) -> None:
    times = PartTimes("cuda")
    for _ in range(20):
        with times.part("deep"):
            device.enqueued += 1
        device.now = device.enqueued
        times.snapshot()
    assert total(times, "deep")[0] == 20
    assert device.events == 2


def test_a_device_far_behind_costs_no_memory(device: Device) -> None:
    times = PartTimes("cuda")
    for _ in range(timing.MOST_PENDING + 10):
        with times.part("deep"):
            device.enqueued += 1
    assert device.events == 2 * timing.MOST_PENDING
    assert times.unmeasured == 10
    device.now = device.enqueued
    with times.part("deep"):
        device.enqueued += 1
    assert times.unmeasured == 10
    assert total(times, "deep")[0] == timing.MOST_PENDING


def test_nothing_is_recorded_while_a_graph_is_captured(device: Device) -> None:
    times = PartTimes("cuda")
    device.capturing = True
    with times.part("deep"):
        pass
    assert device.events == 0
    assert times.unmeasured == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_device() -> None:
    times = PartTimes("cuda")
    matrix = torch.rand(4096, 4096, device="cuda")
    with times.part("deep"):
        for _ in range(20):
            matrix = matrix @ matrix
            matrix = matrix / matrix.norm()
    torch.cuda.synchronize()
    count, seconds = total(times, "deep")
    assert count == 1
    assert 0 < seconds < 10
