import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.data.cache import (
    ABANDONED,
    DiskCache,
    MemoryCache,
    Tensors,
    file_fingerprint,
    network_fingerprint,
)
from studio.errors import OutputError


class Maker:
    """Makes tensors and counts how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> Tensors:
        self.made += 1
        return {"mean": torch.tensor([1.5, -2.0]), "half": torch.ones(2, 2, dtype=torch.bfloat16)}


def disk(folder: Path, told: list[str] | None = None, **settings: Any) -> DiskCache:
    return DiskCache(folder, settings=settings, tell=(told if told is not None else []).append)


def same(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_was_made_of_the_same_facts_is_made_once(tmp_path: Path, kind: str) -> None:
    cache = MemoryCache() if kind == "memory" else disk(tmp_path)
    make = Maker()
    first = cache.get({"content": "a", "box": (0, 1)}, make)
    assert same(first, cache.get({"box": (0, 1), "content": "a"}, make)) and make.made == 1
    cache.get({"content": "a", "box": (0, 2)}, make)
    cache.get({"content": "b", "box": (0, 1)}, make)
    assert make.made == 3


def test_files_serve_a_later_process_with_the_same_settings_only(tmp_path: Path) -> None:
    make = Maker()
    first = disk(tmp_path, vae="x").get({"a": 1}, make)
    assert same(first, disk(tmp_path, vae="x").get({"a": 1}, make)) and make.made == 1
    disk(tmp_path, vae="y").get({"a": 1}, make)
    assert make.made == 2 and len(list(tmp_path.iterdir())) == 2


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage_foreign(path: Path) -> None:
    save_file({"other": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_one_bit, damage_foreign])
def test_a_damaged_file_is_made_again_and_said(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make, told = Maker(), list[str]()
    wanted = disk(tmp_path).get({"a": 1}, make)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert same(disk(tmp_path, told).get({"a": 1}, make), wanted) and make.made == 2
    assert len(told) == 1 and path.name in told[0] and "is damaged" in told[0]
    assert same(disk(tmp_path, told).get({"a": 1}, make), wanted) and make.made == 2 and len(told) == 1


def test_an_interrupted_making_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Tensors:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk(tmp_path).get({"a": 1}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_dead_process_left_unfinished_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * ABANDONED,) * 2)
    disk(tmp_path)
    assert not old.exists() and new.exists()


def test_a_file_that_another_process_finishes_meanwhile_is_no_trouble(tmp_path: Path) -> None:
    # Listed, but gone when looked at.
    (tmp_path / "gone.part").symlink_to(tmp_path / "nowhere")
    assert same(disk(tmp_path).get({"a": 1}, Maker()), Maker()())


def fill(folder: str) -> None:
    cache = disk(Path(folder))
    for number in range(40):
        value = cache.get({"number": number}, lambda number=number: {"x": torch.full((500,), float(number))})
        assert value["x"][0] == number


def test_two_processes_at_the_same_work_leave_whole_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    files = list(tmp_path.iterdir())
    assert len(files) == 40 and all(load_file(file)["x"].shape == (500,) for file in files)


def test_two_threads_making_the_same_entry_both_get_it(tmp_path: Path) -> None:
    barrier, found = threading.Barrier(2), list[Tensors]()

    def make() -> Tensors:
        barrier.wait(10)
        return Maker()()

    threads = [
        threading.Thread(target=lambda: found.append(disk(tmp_path).get({"a": 1}, make))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2 and same(*found) and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cache folder .*file.* cannot be written: .*cache_folder"):
        disk(tmp_path / "file")
    cache = disk(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match="cannot be written"):
        cache.get({"a": 1}, Maker())


def test_fingerprints_follow_every_value(tmp_path: Path) -> None:
    network = torch.nn.Linear(300, 300)
    before = network_fingerprint(network)
    assert network_fingerprint(network) == before
    with torch.no_grad():
        network.weight[217, 113] += 1e-3
    assert network_fingerprint(network) != before
    assert network_fingerprint(network.half()) != before
    file = tmp_path / "a"
    file.write_bytes(b"a")
    first = file_fingerprint(file)
    file.write_bytes(b"b")
    assert file_fingerprint(file) != first
