"""The sampler: the same samples for any layout, without replacement, resumed to the bit."""

import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shear_tron.data import tokens as tokens_module
from shear_tron.data.manifest import Domain, Manifest, Shard
from shear_tron.data.permutation import ROUNDS, keys, permute
from shear_tron.data.sampler import Batches, Sampler, held_out
from shear_tron.data.tokens import document_ends
from shear_tron.files import sha256

SEQUENCE = 8
NAMES = ["web", "code", "books"]
WEIGHTS = np.array([0.5, 0.3, 0.2])


def write_split(folder: Path, split: str, name: str, sizes: list[int], start: int) -> tuple[Shard, ...]:
    """Shards that count upwards from ``start``, so a token tells its place."""
    shards = []
    for number, size in enumerate(sizes):
        file = folder / name / split / f"{number:05d}.ds"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.arange(start, start + size, dtype="<u2").tofile(file)
        np.array([size], dtype="<u8").tofile(f"{file}.index")
        shards.append(Shard(str(file.relative_to(folder)), size, 1, sha256(file)))
        start += size
    return tuple(shards)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """web 0.., in three shards cut where windows are not; code 10000..; books 20000.., five windows long."""
    domains = {
        "web": Domain(write_split(tmp_path, "train", "web", [203, 5, 193], 0), ()),
        "code": Domain(
            write_split(tmp_path, "train", "code", [161], 10000), write_split(tmp_path, "held_out", "code", [90], 30000)
        ),
        "books": Domain(write_split(tmp_path, "train", "books", [SEQUENCE * 5 + 1], 20000), ()),
    }
    manifest = Manifest(str(tmp_path), "tokenizer.json", "0" * 64, 40000, 2, None, 0, 0.1, domains)
    manifest.write()
    return manifest


def sampler(manifest: Manifest, seed: int = 7) -> Sampler:
    return Sampler(manifest, NAMES, SEQUENCE, seed)


# The permutation


@given(size=st.integers(1, 400), key=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size), size, keys(key)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**12, 2**40, 2**40 + 1, 3])
def test_permutation_can_be_entered_anywhere(size: int) -> None:
    index = np.unique(np.array([0, 1, 2, size // 2, size - 1]))
    together = permute(index, size, keys(1))
    assert [int(permute(np.array([i]), size, keys(1))[0]) for i in index] == together.tolist()
    assert len(set(together.tolist())) == len(index)
    assert together.min() >= 0
    assert together.max() < size


@pytest.mark.parametrize("size", [3, 5, 7, 12])
def test_permutation_leaves_no_pattern(size: int) -> None:
    """Over many keys every place is hit equally often, and neighbours land anywhere."""
    trials = 20000
    drawn = np.random.default_rng(size).integers(0, 2**64, size=(ROUNDS, trials), dtype=np.uint64)
    moved = np.stack([permute(np.full(trials, place), size, drawn) for place in range(size)], axis=1)
    for place in range(size):
        assert chi_square(np.bincount(moved[:, place], minlength=size)) < size + 8 * np.sqrt(size)
    for place in range(1, size):
        gaps = np.bincount((moved[:, place] - moved[:, 0]) % size, minlength=size)
        assert gaps[0] == 0
        assert chi_square(gaps[1:]) < size + 8 * np.sqrt(size)


def chi_square(counts: np.ndarray) -> float:  # type: ignore[type-arg]
    """Of counts that should be equal; its mean is their number less one, its deviation sqrt(2 * that)."""
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_sizes_and_keys_may_differ_by_index() -> None:
    """One call for all domains is the same as a call for each."""
    sizes = np.array([5, 1000, 5, 1, 10**12])
    index = np.array([4, 17, 0, 0, 10**11])
    each = [keys("key", number) for number in range(5)]
    alone = [int(permute(index[i : i + 1], int(sizes[i]), each[i])[0]) for i in range(5)]
    assert permute(index, sizes, np.stack(each, axis=1)).tolist() == alone


# The sequence of samples


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_number_of_ranks_reads_the_same_global_batches(manifest: Manifest, ranks: int) -> None:
    whole = sampler(manifest)
    expected = [whole.read(whole.draw(16, WEIGHTS)) for _ in range(6)]
    each = 16 // ranks
    for rank in range(ranks):
        batches = Batches(sampler(manifest), 16, rank * each, (rank + 1) * each, WEIGHTS)
        for batch in expected:
            torch.testing.assert_close(batches.next()[0], batch[rank * each : (rank + 1) * each], rtol=0, atol=0)
        batches.close()


@pytest.mark.parametrize("batch", [1, 4, 24])
def test_batch_size_does_not_change_the_samples(manifest: Manifest, batch: int) -> None:
    one, other = sampler(manifest), sampler(manifest)
    expected = one.read(one.draw(48, WEIGHTS))
    parts = [other.read(other.draw(batch, WEIGHTS)) for _ in range(48 // batch)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=0)


@pytest.mark.parametrize("ranks_after", [1, 2, 8])
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_on_another_number_of_ranks_goes_on_exactly(manifest: Manifest, stop: int, ranks_after: int) -> None:
    """Weights change on the way, and batches were read ahead when the run was killed."""
    history = [WEIGHTS, WEIGHTS, np.array([0.1, 0.1, 0.8]), np.array([0.6, 0.4, 0.0]), WEIGHTS]
    whole = sampler(manifest)
    expected = [whole.read(whole.draw(16, weights)) for weights in history]

    killed = Batches(sampler(manifest), 16, 0, 4, history[0])  # rank 0 of 4
    for weights in history[:stop]:
        killed.set_weights(weights)
        killed.next()
    state = json.loads(json.dumps(killed.state()))
    killed.close()

    rows = 16 // ranks_after
    for rank in range(ranks_after):
        fresh = sampler(manifest)
        fresh.restore(state)
        batches = Batches(fresh, 16, rank * rows, (rank + 1) * rows, history[stop])
        for weights, batch in zip(history[stop:], expected[stop:], strict=True):
            batches.set_weights(weights)
            torch.testing.assert_close(batches.next()[0], batch[rank * rows : (rank + 1) * rows], rtol=0, atol=0)
        batches.close()


def test_new_weights_count_from_the_very_next_batch(manifest: Manifest) -> None:
    batches = Batches(sampler(manifest), 32, 0, 32, [1, 0, 0])
    assert set(batches.next()[1].tolist()) == {0}
    batches.set_weights([0, 1, 0])
    tokens, domains, windows = batches.next()
    assert set(domains.tolist()) == {1}
    assert tokens.min() >= 10000
    alone = Sampler(manifest, NAMES[1:2], SEQUENCE, 7)  # a domain's windows come in an order of its own
    assert windows.tolist() == alone.draw(32, [1]).window.tolist()
    batches.close()


def test_no_window_twice_in_an_epoch_and_none_missing(manifest: Manifest) -> None:
    s = sampler(manifest)
    draws = [s.draw(50, [0.4, 0.4, 0.2]) for _ in range(8)]
    domain, window, epoch = (np.concatenate([getattr(d, f) for d in draws]) for f in ("domain", "window", "epoch"))
    sizes = {0: 50, 1: 20, 2: 5}
    orders: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
    for place, size in sizes.items():
        mine = window[domain == place]
        assert (epoch[domain == place] == np.arange(len(mine)) // size).all()
        for turn in range(len(mine) // size):
            order = mine[turn * size : (turn + 1) * size].tolist()
            assert sorted(order) == list(range(size))
            orders[place].append(order)
    assert orders[0][0] != orders[0][1]  # reshuffled
    assert s.epochs == {"web": 160 / 50, "code": 160 / 20, "books": 80 / 5}


def test_windows_carry_their_tokens_over_shard_ends(manifest: Manifest) -> None:
    s = sampler(manifest)
    draw = s.draw(100, WEIGHTS)
    starts = torch.tensor([0, 10000, 20000])[draw.domain] + torch.from_numpy(draw.window) * SEQUENCE
    expected = starts[:, None] + torch.arange(SEQUENCE + 1)
    torch.testing.assert_close(s.read(draw), expected, rtol=0, atol=0)
    assert s.read(draw).dtype == torch.int64
    torch.testing.assert_close(s.read(draw, 30, 60), expected[30:60], rtol=0, atol=0)


@given(raw=st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any), samples=st.integers(50, 3000))
@example(raw=[7, 2, 1], samples=100)
@settings(max_examples=40, deadline=None)
def test_shares_follow_the_weights_closely(raw: list[int], samples: int) -> None:
    """Independent draws would stray by sqrt(samples); this sequence by a few samples (its discrepancy is O(log n))."""
    s = Sampler.__new__(Sampler)  # shares need no data
    s.names, s._offset = tuple(NAMES), 12345
    weights = np.array(raw) / sum(raw)
    ends = s._upper_ends(weights)
    assert ends[-1] == 1.0  # or a point in the gap that rounding leaves would belong to no domain
    point = (np.arange(samples, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) * 2.0**-53
    counts = np.bincount(np.searchsorted(ends, point, side="right"), minlength=3)
    assert len(counts) == 3
    assert np.abs(counts - weights * samples).max() < 3 + np.log2(samples)
    assert (counts[weights == 0] == 0).all()


def test_every_stretch_of_a_batch_has_the_mixture(manifest: Manifest) -> None:
    draw = sampler(manifest).draw(512, WEIGHTS)
    for start in range(0, 512, 64):
        counts = np.bincount(draw.domain[start : start + 64], minlength=3)
        assert np.abs(counts - WEIGHTS * 64).max() <= 3


def test_the_seed_decides(manifest: Manifest) -> None:
    first, again, other = (sampler(manifest, seed).draw(64, WEIGHTS) for seed in (1, 1, 2))
    assert (first.window == again.window).all()
    assert (first.domain == again.domain).all()
    assert (first.window != other.window).any()
    assert (first.domain != other.domain).any()


def test_drawing_deep_into_a_run_is_as_fast_as_at_its_start(manifest: Manifest) -> None:
    """O(1) state: restoring to sample 10**12 needs no replay."""
    s = sampler(manifest)
    state = s.state() | {"number": 10**12, "drawn": {"web": 5 * 10**11, "code": 3 * 10**11, "books": 2 * 10**11}}
    s.restore(state)
    draw = s.draw(100, WEIGHTS)
    assert np.abs(np.bincount(draw.domain, minlength=3) - WEIGHTS * 100).max() <= 4
    assert len(json.dumps(s.state())) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed=8 is not this run's 7"),
        ({"sequence": 16}, "sequence=16"),
        ({"windows": {"web": 51, "code": 20, "books": 5}}, "windows="),
    ],
)
def test_state_of_another_run_is_refused(manifest: Manifest, change: dict[str, object], message: str) -> None:
    s = sampler(manifest)
    with pytest.raises(ValueError, match=message):
        s.restore(s.state() | change)


@pytest.mark.parametrize("weights", [[1, 1], [1, 1, -1], [0, 0, 0], [1, float("nan"), 1], [1, float("inf"), 1]])
def test_weights_that_are_no_distribution_are_refused(manifest: Manifest, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights="):
        sampler(manifest).draw(4, weights)


def test_names_and_lengths_are_checked(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"'bok' is not in .*; did you mean books"):
        Sampler(manifest, ["bok"], SEQUENCE, 0)
    with pytest.raises(ValueError, match="only once"):
        Sampler(manifest, ["web", "web"], SEQUENCE, 0)
    with pytest.raises(ValueError, match="41 training tokens, less than one window of sequence=41"):
        Sampler(manifest, ["books"], 41, 0)
    assert Sampler(manifest, ["books"], 40, 0).draw(2, [1]).window.tolist() == [0, 0]


def test_a_domain_that_runs_out_is_told_once_loudly(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches(sampler(manifest), 10, 0, 10, [0, 0, 1])
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            batches.next()
    batches.close()
    counts = Counter(record.levelname for record in caplog.records if "books" in record.message)
    # 30 of 5 windows: epochs 1 to 5, two a batch, of which a batch tells the latest
    assert counts == {"WARNING": 1, "INFO": 2}


def test_a_shard_that_shrinks_under_a_run_is_an_error(manifest: Manifest) -> None:
    s = sampler(manifest)
    file = Path(manifest.folder) / manifest.domains["code"].train[0].file
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="shorter than its manifest says"):
        s.read(s.draw(64, [0, 1, 0]))


def test_errors_of_the_reading_thread_reach_the_caller(manifest: Manifest) -> None:
    (Path(manifest.folder) / manifest.domains["code"].train[0].file).unlink()
    batches = Batches(sampler(manifest), 4, 0, 4, [0, 1, 0])
    with pytest.raises(FileNotFoundError):
        batches.next()
    batches.close()


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "OPEN_FILES", 4)
    shards = write_split(tmp_path, "train", "web", [20] * 12, 0)
    manifest = Manifest(str(tmp_path), "t", "0", 300, 2, None, 0, 0, {"web": Domain(shards, ())})
    s = Sampler(manifest, ["web"], SEQUENCE, 0)
    draw = s.draw(58, [1])
    expected = torch.from_numpy(draw.window)[:, None] * SEQUENCE + torch.arange(SEQUENCE + 1)
    torch.testing.assert_close(s.read(draw), expected, rtol=0, atol=0)
    assert len(s._windows[0].stream._open) <= 4


# Held-out windows and document ends


def test_held_out_windows_are_fixed_and_nested(manifest: Manifest) -> None:
    three, all_of_them = (held_out(manifest, "code", SEQUENCE, windows) for windows in (3, 100))
    assert three.shape == (3, SEQUENCE + 1)
    assert all_of_them.shape == (11, SEQUENCE + 1)
    assert torch.equal(all_of_them[:3], three)
    assert sorted(((all_of_them[:, 0] - 30000) // SEQUENCE).tolist()) == list(range(11))
    assert (all_of_them[:, 0] != torch.arange(11) * SEQUENCE + 30000).any()  # not just the first documents


def test_a_domain_without_held_out_tokens_is_an_error(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="domain 'web' has 0 held-out tokens"):
        held_out(manifest, "web", SEQUENCE, 4)


def test_document_ends_follow_separators() -> None:
    inputs = torch.tensor([[5, 0, 6, 7], [8, 9, 3, 0], [0, 4, 4, 4]])
    ends = document_ends(inputs, separator=0)
    assert ends.dtype == torch.int32
    assert ends.tolist() == [0, 2, 4, 8, 9, 12]


def test_document_ends_follow_bos_when_nothing_separates() -> None:
    assert document_ends(torch.tensor([[1, 5, 1, 7], [8, 9, 1, 3]]), bos=1).tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="neither a separator nor a bos"):
        document_ends(torch.tensor([[1, 2]]))


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_document_ends_are_increasing_and_never_cross_rows(rows: list[list[int]]) -> None:
    ends = document_ends(torch.tensor(rows), separator=0).tolist()
    assert ends[0] == 0
    assert ends[-1] == 6 * len(rows)
    assert all(a < b for a, b in pairwise(ends))
    assert set(range(0, 6 * len(rows) + 1, 6)) <= set(ends)
    flat = [token for row in rows for token in row]
    assert all(flat[end - 1] == 0 or end % 6 == 0 for end in ends[1:])
    assert all(index + 1 in ends for index, token in enumerate(flat) if token == 0)


def test_a_token_outside_the_vocabulary_is_refused_where_it_is_read(manifest: Manifest) -> None:
    for split in ("train", "held_out"):
        file = Path(manifest.folder) / "code" / split / "00000.ds"
        tokens = np.fromfile(file, dtype="<u2")
        tokens[70] = 40000
        tokens.tofile(file)
    message = f"00000.ds holds token {40000}, outside the vocabulary of 40000 ids"
    with pytest.raises(ValueError, match=message):
        held_out(manifest, "code", SEQUENCE, 99)
    one = Sampler(manifest, ["code"], SEQUENCE, 7)
    with pytest.raises(ValueError, match=message):
        one.read(one.draw(20, [1.0]))
