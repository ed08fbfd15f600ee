from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import random
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.errors import InvalidRequestError, PayloadTooLargeError
from loraplex.server.upload_archive import MAX_MEMBERS, unpack_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: b"weights" * 1000}


def make_tar(members: dict[str, bytes], packed: bool = True, *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return buffer.getvalue()


def make_zip(members: dict[str, bytes], mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, content)
    return buffer.getvalue()


def unpack(tmp_path: Path, content: bytes, limit: int = 1_000_000) -> dict[str, bytes]:
    archive, folder = tmp_path / "archive", tmp_path / "out"
    archive.write_bytes(content)
    folder.mkdir()
    unpack_adapter(archive, folder, limit)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "content",
    [
        make_tar({f"../{CONFIG}": b"x"}),
        make_tar({f"/tmp/{CONFIG}": b"x"}),
        make_tar({f"a/../../{CONFIG}": b"x"}),
        make_tar({f"a/b/{CONFIG}": b"x"}),
        make_tar({f"a/{CONFIG}": b"x", f"b/{WEIGHTS}": b"x"}),
        make_tar({CONFIG: b"x", f"./{CONFIG}": b"y"}),
        make_tar({}, True, link(CONFIG, tarfile.SYMTYPE)),
        make_tar({}, True, link(CONFIG, tarfile.LNKTYPE)),
        make_tar({}, False, link(CONFIG, tarfile.CHRTYPE)),
        make_tar({}, False, link(CONFIG, tarfile.FIFOTYPE)),
        make_tar({f"{at}.txt": b"" for at in range(MAX_MEMBERS + 1)}),
        make_zip({f"../{CONFIG}": b"x"}),
        make_zip({f"..\\{CONFIG}": b"x"}),
        make_zip({CONFIG: b"/etc/passwd"}, mode=0o120777),
        gzip.compress(b"no tar" * 1000),
        b"",
    ],
    ids=lambda content: f"{len(content)} bytes",  # they tell the time
)
def test_an_archive_that_would_lead_out_of_its_folder_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="'file'"):
        unpack(tmp_path, content)
    assert not list((tmp_path / "out").rglob("*passwd*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]


def test_a_header_that_claims_to_be_endless_takes_no_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 500_000_000
    bomb = gzip.compress(header.tobuf() + bytes(6_000_000))
    with pytest.raises(InvalidRequestError, match="'file'"):
        unpack(tmp_path, bomb)


def test_what_is_passed_over_counts_against_the_limit_before_it_is_unpacked(tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLargeError):
        unpack(tmp_path, make_zip({"zeros": bytes(2_000_000), **FILES}))


def test_a_zip_that_lies_about_a_size_is_refused(tmp_path: Path) -> None:
    content = make_zip({CONFIG: bytes(50_000)})
    lying = content.replace((50_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lying != content
    with pytest.raises(InvalidRequestError, match="'file'"):
        unpack(tmp_path, lying)


def test_an_archive_gives_its_adapter_and_nothing_else(tmp_path: Path) -> None:
    members = {"mine/README.md": b"x", "mine/checkpoint-1/adapter_notes.json": b"x"}
    assert unpack(tmp_path, make_tar(members | {f"mine/{name}": content for name, content in FILES.items()})) == FILES
    assert json.loads(FILES[CONFIG])


def header(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.USTAR_FORMAT)


def with_size(size: int) -> bytes:
    """A header of a file with a size that only a forged one has."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size & (2**96 - 1)).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        header(tarfile.XHDTYPE, 20_480) + b"1" * 20_480 + bytes(1024),
        header(tarfile.XHDTYPE, 1 << 17) + b"a" * (1 << 17) + bytes(1024),
        header(tarfile.XHDTYPE, 0) * 2000,
        header(tarfile.XGLTYPE, 0) * 5000,
        tarfile.TarInfo("y").tobuf() + with_size(-1024) + bytes(2048),
        tarfile.TarInfo("y").tobuf() + with_size(-(10**15)) + bytes(2048),
        make_zip(FILES, method=zipfile.ZIP_BZIP2),
        make_zip(FILES, method=zipfile.ZIP_LZMA),
    ],
    ids=["digits", "long", "chain", "global chain", "negative", "very negative", "bzip2", "lzma"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_odd_headers_are_refused_at_once(tmp_path: Path, content: bytes, packed: bool) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidRequestError, match="'file'"):
        unpack(tmp_path, gzip.compress(content) if packed else content)
    assert time.perf_counter() - began < 2, "a number of that length alone would take many seconds to look for"


def test_a_zip_of_many_entries_is_refused_unread(tmp_path: Path) -> None:
    count = 100_000
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, *[0] * 7, 6, *[0] * 6)
    directory = b"".join(entry + b"%06d" % at for at in range(count))
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), 0)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    content = directory + end
    tracemalloc.start()
    with pytest.raises(InvalidRequestError, match="too long"):
        unpack(tmp_path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


@pytest.mark.parametrize("kind", ["deflated", "stored", "tar", "tar.gz"])
def test_damage_is_the_clients_fault(tmp_path: Path, kind: str) -> None:
    method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
    whole = make_tar(FILES, kind == "tar.gz") if kind.startswith("tar") else make_zip(FILES, method=method)
    draw = random.Random(1)
    for at in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 2, 4])):
            edge = draw.randrange(min(1600, len(whole)))
            damaged[draw.choice([draw.randrange(len(whole)), edge, len(whole) - 1 - edge])] = draw.randrange(256)
        (tmp_path / str(at)).mkdir()
        with contextlib.suppress(InvalidRequestError, PayloadTooLargeError):
            unpack(tmp_path / str(at), bytes(damaged))


def test_a_disk_that_is_full_is_not_the_archives_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "xb":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    for content in (make_tar(FILES), make_zip(FILES)):
        with pytest.raises(OSError, match="No space left"):
            unpack(tmp_path, content)
        (tmp_path / "out").rmdir()
