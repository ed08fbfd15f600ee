"""The hash of a file is that of its bytes, however they arrive."""

from __future__ import annotations

import hashlib
import os
import threading

import pytest

from loraplex.memory import file_hash
from loraplex.memory.adapter_errors import TransientReadError
from loraplex.memory.file_hash import FileHash
from loraplex.memory.tensor_file import read_regular_file, read_tensor_file, tensor_file_digest


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("step", [1, 100, 4096])
def test_bytes_that_arrive_in_portions_are_hashed_as_one(in_thread, step, monkeypatch):
    monkeypatch.setattr(file_hash, "_IN_THREAD", 0 if in_thread else 1 << 20)
    data = bytes(range(256)) * 4
    with FileHash(memoryview(data)) as hashing:
        for end in range(step, len(data) + step, step):
            hashing.extend_to(min(end, len(data)))
    assert hashing.digest() == hashing.digest() == hashlib.sha256(data).digest()


def test_an_error_while_bytes_arrive_ends_the_thread(monkeypatch):
    monkeypatch.setattr(file_hash, "_IN_THREAD", 0)
    before = threading.active_count()
    hashing = FileHash(memoryview(b"1234"))

    def read():
        with hashing:
            hashing.extend_to(2)
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        read()
    assert hashing.digest() == hashlib.sha256(b"12").digest()
    assert threading.active_count() == before


def test_a_file_is_hashed_while_it_is_read(folder):
    expected = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).digest()
    assert read_tensor_file(folder, allow_bin=False, max_bytes=None).digest == expected
    assert tensor_file_digest(folder, allow_bin=False) == expected


def test_a_file_that_shrinks_while_it_is_read_may_be_whole_the_next_time(folder, monkeypatch):
    real = os.fstat

    class Longer:
        def __init__(self, status):
            self.st_mode, self.st_size = status.st_mode, status.st_size + 10

    monkeypatch.setattr("loraplex.memory.tensor_file.os.fstat", lambda descriptor: Longer(real(descriptor)))
    for read in (
        lambda: read_tensor_file(folder, allow_bin=False, max_bytes=None),
        lambda: read_regular_file(folder, "adapter_config.json", None),
    ):
        with pytest.raises(TransientReadError, match="changed while it was being read"):
            read()
