"""Seconds by phase, on a device that works on while Python goes ahead."""

import time

import pytest

from tartvg.timing import PHASES, PhaseTimer


class Device:
    """A queue of work that is done when somebody waits for it, as a GPU's is."""

    def __init__(self):
        self.free_at = time.perf_counter()

    def start(self, seconds):
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def wait(self):
        time.sleep(max(0.0, self.free_at - time.perf_counter()))


def test_a_phase_is_charged_for_its_own_work_only():
    """What was started outside belongs to nobody; what a block started, to that block."""
    device, timer = Device(), PhaseTimer()
    timer.wait = device.wait
    device.start(0.3)
    with timer("vision"):
        device.start(0.25)
    with timer("sample"):
        pass
    with timer("reference"):
        device.start(0.15)
    with timer("update"):
        time.sleep(0.05)
    times = timer.flush()
    assert times["time/vision_s"] == pytest.approx(0.25, abs=0.1)
    assert times["time/sample_s"] < 0.05
    assert times["time/reference_s"] == pytest.approx(0.15, abs=0.1)
    assert times["time/update_s"] == pytest.approx(0.05, abs=0.04)


def test_an_error_is_not_waited_for():
    """A device that has failed raises again when it is waited for, and would hide what went wrong."""
    timer, waits = PhaseTimer(), []
    timer.wait = lambda: waits.append(1)
    with pytest.raises(ZeroDivisionError), timer("update"):
        raise ZeroDivisionError
    assert len(waits) == 1


def test_sums_are_flushed_and_can_be_booked_elsewhere():
    timer = PhaseTimer()
    with timer.booked_as("monitor"), timer("sample"):
        time.sleep(0.002)
    times = timer.flush()
    assert times.keys() == {f"time/{phase}_s" for phase in PHASES}
    assert times["time/monitor_s"] >= 0.002 and times["time/sample_s"] == 0
    assert set(timer.flush().values()) == {0.0}
