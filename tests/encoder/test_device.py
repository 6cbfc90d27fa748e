"""What a device is asked for: an order of sums that all threads share."""

import threading

import torch

from embedtune.encoder.device import repeatable

GPU = torch.device("cuda")


def state():
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


def test_the_last_to_leave_restores_what_the_first_one_found():
    before = state()
    one, two = repeatable(GPU), repeatable(GPU)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert state() == (True, False)
    two.__exit__(None, None, None)
    assert state() == before
    with repeatable(torch.device("cpu")):
        assert state() == before


def test_threads_that_come_and_go_leave_nothing_behind():
    before = state()

    def work():
        for _ in range(200):
            with repeatable(GPU):
                assert state() == (True, False)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state() == before
