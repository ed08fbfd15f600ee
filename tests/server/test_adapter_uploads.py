from __future__ import annotations

import asyncio
import errno
import io
import json
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest
from starlette.testclient import TestClient

from loraplex.server import adapter_uploads, registry_keeper, request_uploads
from loraplex.server.adapter_registry import AdapterRegistry
from loraplex.server.adapter_sources import SourceRules
from loraplex.server.errors import AdapterInvalidError, ConflictError
from loraplex.server.http_stack import restore_adapters
from loraplex.server.registry_file import RegistryFile, StateFolderError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b'{"peft_type": "LORA"}', WEIGHTS: b"weights" * 1000}


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


def make_tar(members: dict[str, bytes], packed: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
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


OTHER = {CONFIG: (CONFIG, b"{}"), WEIGHTS: (WEIGHTS, b"other")}


def saved_paths(state: RegistryFile) -> dict[str, str]:
    entries = json.loads((state.folder / "registry.json").read_text())["adapters"]
    return {entry["name"]: entry["path"] for entry in entries}


def test_replaced_files_go_only_after_the_registry_was_written(
    client: TestClient, state: RegistryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(upload(client).json()["path"])
    write, seen = RegistryFile.write, []

    def failing_twice(file: RegistryFile, adapters: Any) -> None:
        seen.append(first.exists())
        if len(seen) < 3:
            raise StateFolderError("state_dir: full")
        write(file, adapters)

    monkeypatch.setattr(registry_keeper, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(RegistryFile, "write", failing_twice)
    assert upload(client, files=OTHER, replace="true").status_code == 503
    assert eventually(lambda: not first.exists()), "what failed is tried again, and the files go then"
    assert seen[:3] == [True] * 3
    assert stored(state) == [Path(saved_paths(state)["mine"])]


def test_a_delete_that_could_not_be_saved_is_saved_at_the_end(
    make_client: Callable[..., TestClient], state: RegistryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: RegistryFile, adapters: Any) -> None:
        raise StateFolderError("state_dir: full")

    with make_client(state=state, max_adapter_bytes=100_000) as client:
        upload(client)
        with monkeypatch.context() as patched:
            patched.setattr(RegistryFile, "write", fail)
            assert client.delete("/v1/adapters/mine").status_code == 503
        assert list(saved_paths(state)) == ["mine"]
    assert saved_paths(state) == {}


async def test_a_change_whose_client_is_gone_is_written_all_the_same(
    state: RegistryFile, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end = threading.Event(), threading.Event()
    write = RegistryFile.write

    def slow(file: RegistryFile, adapters: Any) -> None:
        began.set()
        may_end.wait(10)
        write(file, adapters)

    monkeypatch.setattr(RegistryFile, "write", slow)
    keeper = registry_keeper.RegistryKeeper(registry, state)
    called: list[bool] = []
    async with keeper.running():
        registry.change("red", tags=("x",))
        keeper.once_saved(lambda: called.append(True))
        task = asyncio.create_task(keeper.saved())
        await asyncio.to_thread(began.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not called
        may_end.set()
        await keeper.saved()
        assert called == [True]
    assert list(saved_paths(state)) == ["red"]
    keeper.save_soon()  # the engine goes on telling of adapters for a moment
    keeper.note([])


def test_kept_files_survive_an_upload_that_fails(client: TestClient, engine: Any, state: RegistryFile) -> None:
    path = Path(upload(client).json()["path"])
    client.delete("/v1/adapters/mine", params={"delete_files": False})
    engine.load_error = AdapterInvalidError("of no use")
    assert upload(client).status_code == 400
    assert stored(state) == [path]
    engine.load_error = None
    assert upload(client).status_code == 200
    client.delete("/v1/adapters/mine")
    assert eventually(lambda: stored(state) == []), "they are the upload's again"


def test_sending_the_same_files_again_mends_damaged_ones(client: TestClient) -> None:
    path = Path(upload(client).json()["path"])
    (path / WEIGHTS).write_bytes(b"cut")
    (path / "adapter_model.bin").write_bytes(b"stray")
    assert upload(client).status_code == 200
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES


def test_a_link_to_an_upload_keeps_its_files(
    client: TestClient, registry: AdapterRegistry, state: RegistryFile, tmp_path: Path
) -> None:
    path = Path(upload(client).json()["path"])
    (tmp_path / "link").symlink_to(path)
    registry.register(registry.new_ref("linked", str(tmp_path / "link")), origin="folder")
    upload(client, "gone", files=OTHER)
    assert client.delete("/v1/adapters/mine").status_code == client.delete("/v1/adapters/gone").status_code == 200
    assert eventually(lambda: stored(state) == [path])
