"""A stop can be asked for by a signal or from a thread; only a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from runner.training import signals
from runner.training.signals import StopSignals, request_stop


def test_a_requested_stop_and_one_signal_in_any_order_do_not_end_the_process_and_a_second_signal_does(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    for order in (["request", "signal"], ["signal", "request", "request"]):
        with StopSignals() as stops:
            for kind in order:
                if kind == "signal":
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    thread = threading.Thread(target=request_stop)
                    thread.start()
                    thread.join()
            assert stops.signal == (signal.SIGTERM if order[0] == "request" else signal.SIGINT) and not ended
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended.pop() == 128 + signal.SIGTERM


def test_a_requested_stop_where_nothing_records_it_is_a_sigterm():
    class Ended(Exception):
        pass

    def end(number: int, frame: object) -> None:
        raise Ended

    previous = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            request_stop()
    finally:
        signal.signal(signal.SIGTERM, previous)
