"""Work ahead of its use: what a signal raises in the thread that waits."""

import contextlib
import random
import signal
import time

from tartvg.data.ahead import ahead


class Asked(SystemExit):
    """What the signal's handler raises, as the handler of a preempted run does."""


def test_a_signal_while_waiting_raises_what_its_handler_raises():
    """Whatever moment it comes in: another exception would end the run with the code of an error."""

    def leave(number, frame):
        raise Asked

    rng, ends = random.Random(0), []
    before = signal.signal(signal.SIGALRM, leave)
    try:
        for _ in range(400):
            with contextlib.suppress(Asked):
                signal.setitimer(signal.ITIMER_REAL, 2e-5 + 2e-3 * rng.random())
                try:
                    for _, found in ahead(range(1000), lambda index: [index], lambda _: time.sleep(1e-5), 2, 2):
                        assert found
                except BaseException as error:
                    ends.append(type(error))
                    raise Asked from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(ends) == {Asked}, ends
