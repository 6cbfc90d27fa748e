"""What parsers are given: good inputs, changed at random, each a function of its number alone; and a watch over them.

Any of them can be had again: `changed(SEEDS, WORDS, "jsonl", 4711)`.
"""

import random
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager

CPU_SECONDS = 20  # for one input: what takes longer hangs
MEGABYTES = 300  # by which the process may grow in a block
BYTES = b"\0\x01\t\n\r \"'#%,-./0123:;<=>BIO[\\]_{|}\x7f\x80\xbf\xc0\xc3\xe2\xed\xef\xf0\xf8\xfe\xff"


def flip(draw, data, others, words):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def replace(draw, data, others, words):
    data[draw.randrange(len(data))] = draw.choice(BYTES)


def insert(draw, data, others, words):
    at = draw.randrange(len(data) + 1)
    data[at:at] = draw.choice(words)


def overwrite(draw, data, others, words):
    at, word = draw.randrange(len(data)), draw.choice(words)
    data[at : at + len(word)] = word


def remove(draw, data, others, words):
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 1, 2, 4, 16, 64))]


def repeat(draw, data, others, words):
    at, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 32))
    data[at:at] = data[at : at + length] * draw.choice((1, 2, 7, 40))


def splice(draw, data, others, words):
    other = draw.choice(others)
    at, start = draw.randrange(len(data)), draw.randrange(len(other))
    data[at:] = other[start:]


def cut(draw, data, others, words):
    del data[draw.randrange(len(data)) :]


HARMS = (flip, replace, insert, insert, overwrite, remove, repeat, splice, cut)


def changed(seeds: Sequence[bytes], words: Sequence[bytes], name: str, number: int) -> bytes:
    """One of the seeds, with one to eight changes."""
    draw = random.Random(f"{name} {number}")
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 5, 8))):
        if data:
            draw.choice(HARMS)(draw, data, seeds, words)
    return bytes(data)


class Hangs(BaseException):
    """An input that takes too long; nothing catches this by mistake."""


@contextmanager
def watched():
    """No input may take long, by this process' own clock, and all of them together may not fill the memory."""

    def stop(number, frame):
        raise Hangs

    before = signal.signal(signal.SIGVTALRM, stop)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size) / 1024
    assert grown < MEGABYTES, f"{grown:.0f} MB more than before"


def fuzzed(
    seeds: Sequence[bytes], words: Sequence[bytes], name: str, numbers: range, call: Callable[[bytes, int], None]
):
    """Give `call` the inputs of these numbers; whatever it raises, the number and the input are said."""
    for seed in seeds:
        call(seed, 0)
    with watched():
        for number in numbers:
            data = changed(seeds, words, name, number)
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
            try:
                call(data, number)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(f"{name} {number}: {type(error).__name__} for {data[:2000]!r}") from error
