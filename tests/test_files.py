"""Files of the cache and of runs: what cannot be read is kept, what is damaged goes, two runs do not disturb each other."""

from __future__ import annotations

import errno
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sphere_edit import SphereEditError
from sphere_edit.files import check_room, is_whole, read_cache, read_tensors, write_cache, write_tensors


@pytest.fixture
def stored(tmp_path) -> Path:
    write_tensors(tmp_path / "moments.safetensors", {"second_moment": torch.eye(8)})
    return tmp_path / "moments.safetensors"


def test_runs_that_are_started_together_find_the_same_folder_writable(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: check_room(tmp_path / f"run-{number}", 0), range(400)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SphereEditError, match="GB are free there"):
        check_room(tmp_path, 1 << 70)


def test_a_damaged_file_of_the_cache_goes(stored):
    assert is_whole(stored)
    stored.write_bytes(stored.read_bytes()[:-4])
    assert not is_whole(stored)
    assert not stored.exists()
    assert not is_whole(stored)


def test_a_file_is_kept_while_too_many_others_are_open(stored):
    kept, most = resource.getrlimit(resource.RLIMIT_NOFILE), []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, kept[1]))
        with suppress(OSError):
            while True:
                most.append(Path("/dev/null").open())  # noqa: SIM115
        with pytest.raises(SphereEditError, match="moments.safetensors could not be read: Too many open files"):
            is_whole(stored)
        with pytest.raises(SphereEditError, match="could not be read: Too many open files"):
            read_cache(stored)
    finally:
        for file in most:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, kept)
    assert is_whole(stored)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENFILE])
def test_a_file_that_cannot_be_opened_is_kept(stored, monkeypatch, number):
    def refuse(*args, **options):
        raise OSError(number, "refused")

    with monkeypatch.context() as context:
        context.setattr(Path, "open", refuse)
        with pytest.raises(SphereEditError, match="could not be read"):
            is_whole(stored)
    assert is_whole(stored)


def test_json_of_the_cache_is_made_again_where_it_is_missing_or_damaged_and_nowhere_else(tmp_path):
    file = tmp_path / "sample.json"
    assert read_cache(file) is None
    for content in (b"[1, 2", b"\xff"):
        file.write_bytes(content)
        assert read_cache(file) is None
    write_cache(file, [1, 2])
    assert read_cache(file) == [1, 2]
    with pytest.raises(SphereEditError, match="could not be read"):
        read_cache(tmp_path)


def test_tensors_are_read_to_where_torch_would_put_them(tmp_path):
    """In a file they lie anywhere, and a matrix product of a tensor that does not begin at 64 bytes can round otherwise."""
    written = {f"{number}": torch.arange(float(number)) for number in range(1, 20)}
    write_tensors(tmp_path / "some.safetensors", written)
    found = read_tensors(tmp_path / "some.safetensors")
    assert {name for name, value in found.items() if value.data_ptr() % 64} == set()
    assert all(torch.equal(found[name], value) for name, value in written.items())


def test_a_tensor_under_another_name_is_not_missed_by_who_reads_some(tmp_path):
    """One flipped bit in the header makes another name of it, which no wish for names finds."""
    path = tmp_path / "some.safetensors"
    write_tensors(path, {"a/keys": torch.ones(2), "a/left": torch.zeros(2)})
    data = path.read_bytes()
    assert data.count(b'"a/keys":') == 1  # the hashes stand in a text of their own, with their quotes escaped
    path.write_bytes(data.replace(b'"a/keys":', b'"a/ceys":'))
    for wanted in (None, lambda name: name.endswith("/keys"), lambda name: name.endswith("/left")):
        with pytest.raises(SphereEditError, match=r"'a/.eys' in it is not what was written"):
            read_tensors(path, wanted)
    assert not is_whole(path)
