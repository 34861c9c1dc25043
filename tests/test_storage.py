"""Outputs are whole, know what made them, and long stages go on where they stopped."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from conftest import Killed

import caches
import storage
from options import UserError


def test_a_stage_goes_on_where_it_stopped(tmp_path, capsys):
    done = []

    def work(group):
        if len(done) == 2 and not again:
            raise Killed
        done.append(group)
        return {"numbers": np.array(group), "squares": np.array(group) ** 2}

    again = False
    batches = [9, 1, 2, 3, 4, 5, 6, 7, 8, 0]
    with pytest.raises(Killed):
        caches.in_chunks(batches, work, tmp_path / "keep", "", size=3)
    again = True
    for _ in range(2):
        assert caches.in_chunks(batches, work, tmp_path / "keep", "", size=3)["squares"].tolist() == [
            n * n for n in range(10)
        ]
    assert done == [[9, 1, 2], [3, 4, 5], [6, 7, 8], [0]]
    (damaged,) = (tmp_path / "keep").glob("00003-*.npz")
    damaged.write_bytes(damaged.read_bytes()[:-30])
    assert caches.in_chunks(batches, work, tmp_path / "keep", "", size=3)["squares"].tolist() == [
        n * n for n in range(10)
    ]
    assert done[4:] == [[3, 4, 5]] and f"{damaged}: cannot be read" in capsys.readouterr().out


def test_a_stage_that_goes_on_in_other_batches_is_whole(tmp_path):
    """As on another device, which holds more of them at a time."""

    def work(group):
        if stops and 5 in group[0]:
            raise Killed
        numbers = np.concatenate(group)
        return {"numbers": numbers, "squares": numbers**2}

    def run(size: int) -> list[int]:
        batches = [list(range(start, min(start + size, 9))) for start in range(0, 9, size)]
        return caches.in_chunks(batches, work, tmp_path / "keep", "", size=1)["squares"].tolist()

    stops = True
    with pytest.raises(Killed):
        run(2)
    stops = False
    assert run(4) == [n * n for n in range(9)]


def test_a_long_stage_tells_a_log_how_far_it_is(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 1000, 25))  # seconds: asked once at the start, then after each chunk
    monkeypatch.setattr(caches.time, "monotonic", lambda: next(clock))

    def run() -> list[str]:
        caches.in_chunks(
            list(range(8)), lambda group: {"numbers": np.array(group)}, tmp_path / "keep", "replies, test", 1
        )
        return capsys.readouterr().err.splitlines()

    assert run() == [
        "replies, test: 3 of 8 batches | 75 s, 125 s to go",
        "replies, test: 6 of 8 batches | 150 s, 50 s to go",
    ]
    for file in sorted((tmp_path / "keep").iterdir())[4:]:
        file.unlink()
    assert run()[-1] == "replies, test: 6 of 8 batches | 150 s, 150 s to go"  # half of them were kept


def test_a_flipped_bit_in_a_kept_result_is_noticed(tmp_path):
    """Anywhere in the file: in the numbers, in the zip's headers, in its directory."""

    def make():
        return {"x": np.arange(20)}

    file = tmp_path / "kept.npz"
    caches.cached(file, make)
    sound = file.read_bytes()
    for place in range(len(sound)):
        for bit in (0, 3):
            content = bytearray(sound)
            content[place] ^= 1 << bit
            file.write_bytes(content)
            assert caches.cached(file, make)["x"].tolist() == list(range(20))


def test_a_flipped_bit_in_the_head_of_a_large_kept_result_is_noticed(tmp_path):
    """There the checksum is of more than numpy reads in one go."""
    large = np.arange(8000, dtype=np.float32).reshape(1000, 8)
    file = tmp_path / "kept.npz"
    caches.keep_arrays(file, {"x": large})
    sound = file.read_bytes()
    for place in range(0, 180):
        for bit in range(8):
            content = bytearray(sound)
            content[place] ^= 1 << bit
            file.write_bytes(content)
            found = caches.read_arrays(file)
            assert found is None or np.array_equal(found["x"], large)


def test_what_an_abandoned_stage_left_beside_is_swept_with_all_that_is_in_it(tmp_path):
    old, young, other = (tmp_path / name for name in ("vectors-a", "vectors-b", "scores-a"))
    for folder in (old, young, other):
        (folder / "candidates" / "0f").mkdir(parents=True)
        (folder / "candidates" / "0f" / "00000.npz").write_text("")
    for folder in (old, young, other):
        for path in (folder, *folder.rglob("*")):
            if path.name != "00000.npz" or folder != young:
                os.utime(path, (0, 0))
    caches.sweep_kept(old)  # its own stage goes on with it
    assert old.exists()
    caches.sweep_kept(tmp_path / "vectors-c")
    assert not old.exists() and young.exists() and other.exists()


def test_an_output_and_its_note_never_disagree(tmp_path, monkeypatch):
    """Killed at any point of replacing an output: the next call keeps it only where its note is true."""
    output = tmp_path / "out.csv"
    storage.write_csv(output, pd.DataFrame({"x": [1]}), origin={"from": "one"})
    real, left = storage.Path.replace, [0]

    def replace(self, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return real(self, target)

    for point in range(2):
        left[0] = point
        with monkeypatch.context() as patch:
            patch.setattr(storage.Path, "replace", replace)
            with pytest.raises(Killed):
                storage.write_csv(output, pd.DataFrame({"x": [2]}), origin={"from": "two"})
        assert (
            not output.exists()
            or "1" in output.read_text()
            and json.loads(storage.origin_file(output).read_text()) == {"from": "one"}
        )
        assert not storage.ready(output, {"from": "two"}, overwrite=False)
    storage.write_csv(output, pd.DataFrame({"x": [2]}), origin={"from": "two"})
    assert storage.ready(output, {"from": "two"}, overwrite=False)
    with pytest.raises(UserError, match="made with another from"):
        storage.ready(output, {"from": "three"}, overwrite=False)


def test_an_output_older_than_its_sources_is_named(tmp_path, capsys):
    source, output = tmp_path / "source.csv", tmp_path / "output.csv"
    source.write_text("one")
    storage.write_text(output, "made", origin={"dialogues": storage.sha256(source)})
    assert storage.warn_if_stale(output, {"dialogues": source}) == []
    source.write_text("two")
    assert storage.warn_if_stale(output, {"dialogues": source}) == ["dialogues"]
    assert "output.csv: what it was made from has changed since: dialogues" in capsys.readouterr().out


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path):
    target = tmp_path / "out.txt"
    storage.write_text(target, "before")

    def full(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match=r"out\.txt: cannot be written .*No space left"),
        storage.whole_file(target) as part,
    ):
        full(part)
    assert target.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_one_set_of_weights_under_other_settings_is_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = set()
    for pooling in ("cls", "mean", "cls"):
        (tmp_path / "config.json").write_text(json.dumps({"pooling": pooling}))
        found.add(storage.identity(tmp_path))
    assert len(found) == 2
