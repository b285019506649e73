"""Thousands of damaged inputs, the same ones every time: each is read, or refused in one line; none hangs or unfolds.

``SHEAR_TRON_FUZZ=100000`` asks for more of them (`make soak`).
"""

import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inputs import INPUTS, WHOLE, Reader, files, make, one_line

CASES = int(os.environ.get("SHEAR_TRON_FUZZ", "10000"))
WORDS = '[ ] { } " : , &a *a !! - NaN 1e999 null true ../ <<: ? | -1 0 1.5 "x" {} []'
TOKENS = (*WORDS.split(" "), "\\", "\xe9", "\0", "\n", "\t", ": ", "- ", "9" * 400, "[" * 200)
MOST = 4 << 30  # bytes that a process may take beyond what it has
LONGEST = 60  # seconds, by the clock, after which an input counts as one that hangs


def damage(content: bytes, draw: random.Random) -> bytes:
    """Flipped, cut, doubled, spliced with what parsers trip over; now and then something else altogether."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 30])):
        place = draw.randrange(len(changed) + 1)
        how = draw.randrange(6)
        if how == 0 and place < len(changed):
            changed[place] = draw.randrange(256)
        elif how == 1:
            del changed[place : place + draw.choice([1, 3, 20])]
        elif how == 2:
            changed[place:place] = draw.choice(TOKENS).encode()
        elif how == 3:
            changed[place:place] = changed[place : place + draw.randrange(40)]
        elif how == 4:
            del changed[place:]
        else:
            end = place + draw.randrange(8)
            changed[place:end] = draw.choice(TOKENS).encode()
    return bytes(changed)


def swapped(content: bytes, draw: random.Random) -> bytes:
    """A well-formed document with one value replaced by another kind of value."""
    value = json.loads(content)
    places = list(_places(value))
    holder, key = draw.choice(places)
    holder[key] = draw.choice([None, True, -1, 2**70, 0.5, "x", "", "../../etc", [], [1], {}, {"a": {}}, "0" * 5000])
    return json.dumps(value).encode()


def _places(value: object):  # type: ignore[no-untyped-def]
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])  # type: ignore[index]


IN_PLACE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda _: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nowhere": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file),
    "an endless device": lambda file: file.symlink_to("/dev/zero"),
    "an empty file": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(10_000)),
    "no UTF-8": lambda file: file.write_bytes(b"\xff\xfe\x80" * 100),
    "words": lambda file: file.write_text("some words\n" * 9),
    "a list": lambda file: file.write_text("[1, 2]\n"),
    "a number": lambda file: file.write_text("7\n"),
    "an empty object": lambda file: file.write_text("{}\n"),
    "deep lists": lambda file: file.write_text("[" * 100_000 + "]" * 100_000 + "\n"),
    "deep objects": lambda file: file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000 + "\n"),
    "a large number": lambda file: file.write_text('{"a": ' + "9" * 100_000 + "}\n"),
    "a long line": lambda file: file.write_text("x" * 5_000_000),
}


def hang(*_: object) -> None:
    raise TimeoutError(f"not done after {LONGEST} seconds")


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Neither time nor memory without end: a test that fails must not take the machine with it."""
    before = signal.signal(signal.SIGALRM, hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    (now,) = re.findall(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    resource.setrlimit(resource.RLIMIT_DATA, ((int(now) << 10) + MOST, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Told:
    """What an input's readers say of damage."""

    def __init__(self, read: Reader) -> None:
        self.read, self.errors, self.slowest = read, list[str](), 0.0
        self.most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB

    def ask(self, what: str) -> None:
        began, at = time.process_time(), time.monotonic()
        signal.alarm(LONGEST)
        try:
            self.read()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong = [f"{what}: {each}" for each in one_line(error)]
            assert not wrong, wrong
            self.errors.append(str(error))
        finally:
            signal.alarm(0)
        assert time.monotonic() - at < LONGEST, f"{what}: hangs"  # whoever caught the alarm
        self.slowest = max(self.slowest, time.process_time() - began)

    def require_bounded(self) -> None:
        assert self.slowest < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.most < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
def test_damaged_input_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    told, targets = Told(make(kind, tmp_path / kind)), files(tmp_path / kind)
    draw, cases = random.Random(f"{kind} 1"), int(CASES * INPUTS[kind][1] / 100)
    for number in range(cases):
        file = targets[number % len(targets)]
        good = file.read_bytes()
        end = len(good) if file.suffix in WHOLE else 4096  # of safetensors, the header
        by_value = file.suffix == ".json" and draw.random() < 0.5
        file.write_bytes(swapped(good, draw) if by_value else damage(good[:end], draw) + good[end:])
        told.ask(f"{file.relative_to(tmp_path)}, case {number}")
        file.write_bytes(good)
    told.require_bounded()
    assert len(told.errors) > cases * 0.2


@pytest.mark.parametrize("kind", INPUTS)
def test_anything_in_place_of_an_input_is_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    told = Told(make(kind, tmp_path / kind))
    for file in files(tmp_path / kind):
        good = file.read_bytes()
        for name, put in IN_PLACE.items():
            file.unlink()
            put(file)
            told.ask(f"{name} in place of {file.relative_to(tmp_path)}")
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
            file.write_bytes(good)
    told.require_bounded()
