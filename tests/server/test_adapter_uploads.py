from __future__ import annotations

import asyncio
import errno
import gzip
import io
import json
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest
from starlette.testclient import TestClient

from loraplex.server import adapter_uploads, request_uploads
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.errors import AdapterInvalidError, ConflictError, InvalidRequestError, PayloadTooLargeError
from loraplex.server.http_stack import restore_adapters
from loraplex.server.registry_file import RegistryFile
from loraplex.server.upload_archive import MAX_MEMBERS, unpack_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: b"weights" * 1000}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[RegistryFile]:
    file = RegistryFile(tmp_path / "state")
    yield file
    file.close()


@pytest.fixture
def client(make_client: Callable[..., TestClient], state: RegistryFile) -> Iterator[TestClient]:
    with make_client(state=state, max_body_bytes=1000, max_adapter_bytes=100_000) as client:
        yield client


def upload(client: TestClient, name: str = "mine", files: Any = None, **fields: Any) -> Any:
    parts = {part: (part, content) for part, content in FILES.items()} if files is None else files
    return client.post("/v1/adapters", data={"id": name, **fields}, files=parts)


def error_of(answer: Any) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["message"]


def stored(state: RegistryFile) -> list[Path]:
    assert list(state.staging.iterdir()) == [], "nothing stays in between"
    return sorted(state.adapters.iterdir())


def eventually(condition: Callable[[], Any]) -> bool:
    deadline = time.monotonic() + 10
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(found)


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


def make_zip(members: dict[str, bytes], mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def test_an_upload_is_verified_kept_and_served_and_survives_a_restart(
    client: TestClient, engine: Any, state: RegistryFile, registry: AdapterRegistry
) -> None:
    answer = upload(client, tags="b, a,b", pinned="true")
    assert answer.status_code == 200, answer.text
    card = answer.json()
    assert (card["id"], card["source"], card["state"], card["tags"]) == ("mine", "upload", "ready", ["a", "b"])
    assert card["pinned"] is True
    [folder] = stored(state)
    assert card["path"] == str(folder) == engine.loaded["mine"].path
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    assert client.post("/v1/completions", json={"prompt": "a", "model": "mine"}).status_code == 200
    fresh = AdapterRegistry("tiny")
    restore_adapters(fresh, state, SourceRules())
    mine = fresh.named("mine", "")
    assert (mine.ref.path, mine.origin, mine.pinned, mine.tags) == (str(folder), "upload", True, ("a", "b"))
    assert mine.identity == card["identity"]
    assert folder.exists()


def test_the_name_is_invisible_until_it_was_verified(client: TestClient, engine: Any, registry: Any) -> None:
    seen: list[bool] = []
    engine.on_load = lambda ref: seen.append(registry.get("mine") is None and Path(ref.path, WEIGHTS).is_file())
    assert upload(client).status_code == 200
    assert seen == [True]


@pytest.mark.parametrize("prefix", ["", "./", "mine/", "./mine/"])
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_is_unpacked_wherever_in_it_the_adapter_lies(
    client: TestClient, state: RegistryFile, prefix: str, kind: str
) -> None:
    members = {prefix + name: content for name, content in {"README.md": b"x", **FILES}.items()}
    packed = make_zip(members) if kind == "zip" else make_tar(members, kind == "tar.gz")
    answer = upload(client, files={"file": (f"mine.{kind}", packed)})
    assert answer.status_code == 200, answer.text
    [folder] = stored(state)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


def test_files_may_be_named_by_their_parts_or_by_themselves(client: TestClient, state: RegistryFile) -> None:
    files = [("files", (f"some/folder/{name}", content)) for name, content in FILES.items()]
    assert upload(client, files=files).status_code == 200
    assert len(stored(state)) == 1


def test_the_same_files_under_two_names_are_stored_once_and_go_with_the_last_name(
    client: TestClient, state: RegistryFile
) -> None:
    paths = {upload(client, name).json()["path"] for name in ("one", "two")}
    assert len(paths) == len(stored(state)) == 1
    client.delete("/v1/adapters/one")
    assert upload(client, "two").json()["revision"] == 2, "the same again changes nothing"
    assert len(stored(state)) == 1
    client.delete("/v1/adapters/two")
    assert eventually(lambda: not stored(state))


def test_another_content_needs_replace_and_the_old_files_go(client: TestClient, state: RegistryFile) -> None:
    first = upload(client).json()
    other = {CONFIG: (CONFIG, b"{}"), WEIGHTS: (WEIGHTS, b"other")}
    status, param, message = error_of(upload(client, files=other))
    assert (status, param) == (409, "id")
    assert "'replace'" in message
    assert len(stored(state)) == 1
    second = upload(client, files=other, replace="true").json()
    assert second["path"] != first["path"]
    assert eventually(lambda: stored(state) == [Path(second["path"])])


def test_files_stay_while_a_request_uses_them(client: TestClient, engine: Any, state: RegistryFile) -> None:
    upload(client)
    ref = engine.loaded["mine"]
    engine.open.append(ref)
    assert client.delete("/v1/adapters/mine").status_code == 200
    time.sleep(2 * adapter_uploads.RELEASE_SECONDS)
    assert len(stored(state)) == 1
    engine.open.remove(ref)
    assert eventually(lambda: not stored(state))


def test_files_may_be_kept_and_others_are_never_deleted(
    client: TestClient, state: RegistryFile, tmp_path: Path
) -> None:
    path = upload(client).json()["path"]
    assert client.delete("/v1/adapters/mine", params={"delete_files": False}).status_code == 200
    restore_adapters(AdapterRegistry("tiny"), state, SourceRules())
    assert Path(path, WEIGHTS).exists()
    folder = tmp_path / "theirs"
    folder.mkdir()
    client.post("/v1/adapters", json={"id": "theirs", "path": str(folder)})
    assert error_of(client.delete("/v1/adapters/theirs", params={"delete_files": True}))[:2] == (400, "delete_files")
    assert client.delete("/v1/adapters/theirs").status_code == 200
    assert folder.exists()


def test_what_the_engine_refuses_leaves_nothing(client: TestClient, engine: Any, state: RegistryFile) -> None:
    engine.load_error = AdapterInvalidError("lora_A has rank 4", param="layers.0")
    assert error_of(upload(client))[:2] == (400, "layers.0")
    engine.load_error, engine.pin_error = None, ConflictError("too much is pinned")
    assert error_of(upload(client, pinned="true"))[0] == 409
    assert stored(state) == []
    assert client.get("/v1/adapters/mine").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"id": "a/b"}, "id"),
        ({"id": "tiny"}, "id"),
        ({"id": ""}, "id"),
        ({"pinned": "maybe"}, "pinned"),
        ({"replace": "2"}, "replace"),
        ({"tags": "x" * 65}, "tags"),
        ({"tags": "y" * 20_000}, "tags"),
        ({"color": "red"}, "color"),
    ],
)
def test_a_field_out_of_range_is_named(client: TestClient, state: RegistryFile, fields: Any, param: str) -> None:
    answer = client.post("/v1/adapters", data={"id": "mine"} | fields, files=[(CONFIG, FILES[CONFIG])])
    assert error_of(answer)[:2] == (400, param)
    assert stored(state) == []


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: (CONFIG, b"{}")},
        {WEIGHTS: (WEIGHTS, b"x")},
        {"weights": ("weights.bin", b"x")},
        {"file": ("x.tar", make_tar(FILES)), CONFIG: (CONFIG, b"{}")},
        [(CONFIG, (CONFIG, b"{}")), ("again", (CONFIG, b"{}")), (WEIGHTS, (WEIGHTS, b"x"))],
        {"file": ("x.tar", b"no archive")},
        {"file": ("x.zip", make_zip(FILES)[:-30])},
        {"file": ("x.tar.gz", make_tar(FILES)[:-100])},
        {"file": ("x.tar", make_tar({"README.md": b"x"}))},
    ],
)
def test_an_upload_without_an_adapter_is_a_400(client: TestClient, state: RegistryFile, files: Any) -> None:
    assert error_of(upload(client, files=files))[0] == 400
    assert stored(state) == []


@pytest.mark.parametrize(
    "body", [b"", b"--x\r\n", b"--x--\r\n", b"nonsense", b'--x\r\ncontent-disposition: form-data; name="id"']
)
def test_a_form_that_is_none_is_a_400(client: TestClient, state: RegistryFile, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(client.post("/v1/adapters", content=body, headers=headers))[0] == 400
    headers = {"content-type": "multipart/form-data"}
    assert "boundary" in error_of(client.post("/v1/adapters", content=body, headers=headers))[2]
    assert stored(state) == []


def test_the_limit_of_uploads_is_their_own(client: TestClient, state: RegistryFile, monkeypatch: Any) -> None:
    assert upload(client).status_code == 200, "larger than any other body may be"
    assert client.post("/v1/completions", json={"prompt": "x" * 2000}).status_code == 413
    monkeypatch.setattr(request_uploads, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr(adapter_uploads, "OVERHEAD_BYTES", 0)
    large = {CONFIG: (CONFIG, b"{}"), WEIGHTS: (WEIGHTS, bytes(100_001))}
    status, _, message = error_of(upload(client, "large", files=large))
    assert (status, "'max_adapter_bytes'" in message) == (413, True)

    def unannounced() -> Iterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="adapter_config.json"; filename="a"\r\n\r\n'
        for _ in range(11):
            yield bytes(10_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/v1/adapters", content=unannounced(), headers=headers).status_code == 413
    bomb = make_tar({**FILES, "zeros": bytes(10_000_000)})
    assert len(bomb) < 100_000
    assert error_of(upload(client, "bomb", files={"file": ("x.tar.gz", bomb)}))[:2] == (413, "file")
    assert len(stored(state)) == 1


def test_a_full_disk_is_a_507_and_leaves_nothing(client: TestClient, state: RegistryFile, monkeypatch: Any) -> None:
    def full(self: Any, file: IO[bytes]) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(request_uploads._Part, "_flush", full)
    answer = upload(client)
    assert error_of(answer)[0] == 507
    assert (answer.json()["error"]["code"], answer.headers["x-should-retry"]) == ("insufficient_storage", "false")
    assert stored(state) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    assert "no room" in error_of(upload(client))[2]


def test_what_cannot_be_saved_says_so(client: TestClient, state: RegistryFile, monkeypatch: Any) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    client.post("/v1/adapters/red/pin")
    monkeypatch.setattr("loraplex.server.registry_file.os.fsync", full)
    answer = client.post("/v1/adapters/red/unpin")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_saved")
    assert "lost at a restart" in answer.json()["error"]["message"]


def test_without_a_state_folder_the_error_says_which_setting_to_give(make_client: Any) -> None:
    client = make_client()
    answer = upload(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "uploads_disabled")
    assert "'state_dir'" in answer.json()["error"]["message"]


def test_nothing_is_received_without_an_engine(client: TestClient, engine: Any, state: RegistryFile) -> None:
    engine.state = "restarting"
    assert upload(client).status_code == 503
    assert stored(state) == []


def test_a_client_that_goes_away_leaves_nothing(serve: Callable[..., Any], state: RegistryFile) -> None:
    server = serve(state=state)
    host, port = server.url.removeprefix("http://").split(":")

    async def go_away() -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/adapters HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n"
        part = '--x\r\ncontent-disposition: form-data; name="adapter_config.json"; filename="a"\r\n\r\n'
        writer.write(f"{head}content-type: multipart/form-data; boundary=x\r\n\r\n{part}".encode() + bytes(200_000))
        await writer.drain()
        assert await asyncio.to_thread(eventually, lambda: list(state.staging.iterdir()))
        writer.close()

    asyncio.run(go_away())
    assert eventually(lambda: not list(state.staging.iterdir()))


def test_uploads_of_one_name_and_content_at_once_all_succeed(serve: Callable[..., Any], state: RegistryFile) -> None:
    url = serve(state=state).url

    def send(_: int) -> int:
        parts = {part: (part, content) for part, content in FILES.items()}
        answer = httpx2.post(f"{url}/v1/adapters", data={"id": "mine"}, files=parts, verify=False)
        return answer.status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(send, range(4))) == [200] * 4
    assert len(stored(state)) == 1


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
