from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_source import AdapterSource, allowed_sources, parse_source, resolve_source, source_problem

PARTS = st.from_regex(r"[A-Za-z0-9_.=+@:,~ !()-]{1,12}", fullmatch=True).filter(
    lambda part: part not in (".", "..") and part == part.strip()
)
BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9-]{2,20}", fullmatch=True)
SCHEMES = st.sampled_from(["s3", "gs", "az", "S3", "Gs", "aZ"])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/srv/adapters/a", AdapterSource("file", "/srv/adapters/a")),
        ("adapters/a", AdapterSource("file", "adapters/a")),
        ("file:///srv/a%20b", AdapterSource("file", "/srv/a b")),
        ("FILE:////srv//a", AdapterSource("file", "/srv/a")),
        ("s3://bucket", AdapterSource("s3", "bucket")),
        ("S3://bucket/a/b/", AdapterSource("s3", "bucket/a/b")),
        ("gs://bucket/a@b", AdapterSource("gs", "bucket/a@b")),
        ("az://container/ü x", AdapterSource("az", "container/ü x")),
        ("hf://org/name", AdapterSource("hf", "org/name")),
        ("HF://org/name@refs/pr/1", AdapterSource("hf", "org/name", "refs/pr/1")),
    ],
)
def test_what_each_kind_of_path_stands_for(path: str, source: AdapterSource) -> None:
    assert parse_source(path) == source
    assert parse_source(source.url) == source, "the url stands for the same source"


def test_bucket_and_prefix_are_told_apart() -> None:
    assert (parse_source("s3://bucket/a/b").bucket, parse_source("s3://bucket/a/b").prefix) == ("bucket", "a/b")
    assert (parse_source("s3://bucket").bucket, parse_source("s3://bucket").prefix) == ("bucket", "")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "a\0b",
        "merged:{}",
        "http://169.254.169.254/latest",
        "https://host/x",
        "ftp://host/x",
        "file://host/x",
        "file://x",
        "file:///a?b",
        "file:///a%00",
        "file:///a%ff",
        "s3://",
        "s3:///a",
        "s3://b/a",
        "s3://Bucket/a",
        "s3://bucket//a",
        "s3://bucket/a//",
        "s3://bucket/./a",
        "s3://bucket/../other/a",
        "s3://bucket/a/..",
        "s3://bucket/%2e%2e/other",
        "s3://bucket/a?versionId=1",
        "s3://bucket/a#b",
        "s3://bucket/a\\..\\b",
        "s3://bucket/a\nb",
        "s3://bucket/ a",
        "s3://bu..cket/a",
        "s3://user:pass@bucket/a",
        "s3://bucket/" + "a" * 2000,
        "hf://org",
        "hf://org/name/extra",
        "hf://org/..",
        "hf://../name",
        "hf://org/na--me",
        "hf://org/name@",
        "hf://org/name@../x",
        "hf://org/name@a//b",
        "hf://org/%2e",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(path: str) -> None:
    with pytest.raises(AdapterFileError, match="expected a folder, file:///folder, s3://bucket/prefix"):
        parse_source(path)


@pytest.mark.parametrize(
    "path",
    [
        "https://alice:hunter2@host/x",
        "s3://alice:hunter2@bucket/x",
        "s3://alice:hun/hunter2@bucket/%",
        "hf://hunter2@org/name/x",
        "hf://alice:hunter2@org/name",
        "https://host/x?X-Amz-Signature=hunter2",
        "s3://bucket/x#hunter2",
    ],
)
def test_refusals_show_no_secrets(path: str) -> None:
    with pytest.raises(AdapterFileError) as caught:
        parse_source(path)
    assert "hunter2" not in caught.value.message
    assert "hunter2" not in str(source_problem(path, (), ()))


def test_a_bare_id_is_one_of_the_hub_only_at_the_door_and_only_where_there_is_no_such_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source("org/name@main") == AdapterSource("hf", "org/name", "main")
    assert parse_source("org/name") == AdapterSource("file", "org/name")
    (tmp_path / "org/name").mkdir(parents=True)
    assert resolve_source("org/name") == AdapterSource("file", "org/name")


@pytest.mark.parametrize("path", ["/org/name", "./org/name", "org", "org/name/x", "../name", "a b/c", "org/name@"])
def test_what_does_not_look_like_an_id_is_a_folder(path: str) -> None:
    assert not resolve_source(path).is_remote


@given(SCHEMES, BUCKETS, st.lists(PARTS, max_size=4))
def test_the_url_is_canonical(scheme: str, bucket: str, parts: list[str]) -> None:
    plain = parse_source("/".join([f"{scheme}://{bucket}", *parts]))
    assert plain.url == "/".join([f"{scheme.lower()}://{bucket}", *parts])
    assert parse_source(plain.url) == plain
    assert parse_source(f"{plain.url}/") == plain


@given(st.text(max_size=40), st.sampled_from(["", "s3://", "hf://", "file://", "gs://bucket/", "merged:"]))
def test_any_text_is_a_source_or_refused(text: str, start: str) -> None:
    for parse in (parse_source, resolve_source):
        try:
            source = parse(start + text)
        except AdapterFileError as error:
            assert error.message.isprintable()  # noqa: PT017
        else:
            assert parse_source(source.url) == source or not source.is_remote
    source_problem(start + text, (Path("/srv"),), allowed_sources(["s3://bucket/a"]))


@pytest.mark.parametrize(
    ("prefix", "path", "covered"),
    [
        ("s3://bucket/team", "s3://bucket/team", True),
        ("s3://bucket/team/", "s3://bucket/team/a/b", True),
        ("S3://bucket/team/", "s3://bucket/team/a", True),
        ("s3://bucket/team", "s3://bucket/team2/a", False),
        ("s3://bucket/team", "s3://bucket", False),
        ("s3://bucket", "s3://bucket2/a", False),
        ("s3://bucket", "gs://bucket/a", False),
        ("s3://", "s3://any-bucket/a", True),
        ("hf://", "hf://org/name", True),
        ("hf://org/", "hf://org/name@main", True),
        ("hf://org", "hf://org2/name", False),
        ("hf://org/name", "hf://org/name@v1", True),
        ("hf://org/name@v1", "hf://org/name@v1", True),
        ("hf://org/name@v1", "hf://org/name", False),
        ("hf://org/name@v1", "hf://org/name@v2", False),
        ("hf://org", "org/name", True),
    ],
)
def test_a_prefix_covers_whole_segments(prefix: str, path: str, covered: bool) -> None:
    problem = source_problem(path, (), allowed_sources([prefix]))
    assert (problem is None) == covered
    assert covered or "adapter_sources" in str(problem)


@pytest.mark.parametrize(
    "prefix", ["", "/srv", "file:///srv", "https://host/", "s3://b?x", "hf://a/b/c", "s3://a/../b"]
)
def test_a_prefix_that_is_none_stops_the_start(prefix: str) -> None:
    with pytest.raises(AdapterFileError, match="adapter_sources"):
        allowed_sources([prefix])


@pytest.mark.parametrize("path", ["s3://bucket/a", "gs://bucket/a", "az://bucket/a", "hf://org/name", "S3://bucket/a"])
def test_without_a_configured_prefix_no_remote_source_may_be_named(path: str) -> None:
    assert "not allowed" in str(source_problem(path, (), ()))


@given(st.lists(st.sampled_from(["team", "..", ".", "", "%2e%2e", "%2E.", "a", "@", "other"]), max_size=6))
@example(["team", "..", "other"])
def test_no_spelling_leaves_a_prefix(parts: list[str]) -> None:
    path = "s3://bucket/" + "/".join(parts)
    if source_problem(path, (), allowed_sources(["s3://bucket/team"])) is None:
        assert parse_source(path).place.startswith("bucket/team")
        assert not {"..", ".", ""} & set(parse_source(path).place.split("/"))


def test_without_roots_any_folder_may_be_named(tmp_path: Path) -> None:
    assert source_problem(str(tmp_path / "x"), (), ()) is None
    assert source_problem(f"file://{tmp_path}/x", (), ()) is None


def test_local_folders_must_lie_below_a_root_once_links_and_escapes_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    inside = [f"{root}/a", f"file://{root}/a", f"{root}/a/../b", f"//{root}/a", f"file:///{root}/a"]
    outside = [
        f"{tmp_path}/secret",
        f"{root}/../secret",
        f"{root}/link",
        f"{root}2/a",
        f"file://{root}/../secret",
        f"file://{root}/%2e%2e/secret",
        f"file://{root}/link/x",
    ]
    assert [path for path in inside if source_problem(path, (root,), ()) is not None] == []
    assert [path for path in outside if source_problem(path, (root,), ()) is None] == []


@given(st.lists(st.sampled_from(["..", ".", "root", "secret", "", "%2e%2e", "a"]), max_size=7), st.booleans())
def test_no_spelling_leaves_a_root(parts: list[str], as_url: bool) -> None:
    path = ("file://" if as_url else "") + "/srv/root/" + "/".join(parts)
    assume("\0" not in path)
    if source_problem(path, (Path("/srv/root"),), ()) is None:
        assert Path(parse_source(path).place).resolve().is_relative_to("/srv/root")


def test_paths_are_judged_without_torch() -> None:
    check = "import sys, loraplex.memory.adapter_source; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
