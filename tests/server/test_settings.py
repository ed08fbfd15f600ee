from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.engine_config import EngineConfig
from loraplex.server.settings import Settings, SettingsError, load_settings

GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("LORAPLEX_"):
            monkeypatch.delenv(name)


def load(**flags: Any) -> Settings:
    return load_settings({"model": "base", **flags})


def fault(file: Path | None = None, **flags: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings({"model": "base", **flags}, file)
    return caught.value.message


def test_defaults_serve_on_loopback_without_keys() -> None:
    settings = load()
    assert (settings.host, settings.port, settings.api_keys) == ("127.0.0.1", 8000, ())
    assert (settings.dtype, settings.device, settings.engine) == ("auto", "auto", "process")
    assert not settings.allow_bin


def test_flags_come_before_the_environment_before_the_file_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\npage_tokens: 32\nmax_running: 3\n", encoding="utf-8")
    monkeypatch.setenv("LORAPLEX_PORT", "2")
    monkeypatch.setenv("LORAPLEX_PAGE_TOKENS", "64")
    settings = load_settings({"model": "base", "port": "3"}, file)
    assert (settings.port, settings.page_tokens, settings.max_running, settings.max_waiting) == (3, 64, 3, 4096)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("server.yaml", "model: mine\npool-bytes: 2GiB\nadapter: [a=x, b=y]\n"),
        ("server.yml", "model: mine\npool_bytes: 2147483648\nadapter: a=x,b=y\n"),
        ("server.toml", 'model = "mine"\npool-bytes = "2GiB"\nadapter = ["a=x", "b=y"]\n'),
    ],
)
def test_files_are_yaml_or_toml_and_may_hold_everything(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    settings = load_settings({}, tmp_path / name)
    assert (settings.model, settings.pool_bytes, settings.named_adapters) == ("mine", 2 * GIB, {"a": "x", "b": "y"})


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", GIB), ("1GB", 10**9), ("512MiB", 512 << 20), ("4096", 4096), ("1.5 GiB", GIB * 3 // 2)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert load(pool_bytes=text).pool_bytes == size


def test_lists_are_separated_by_commas_or_given_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEYS", "one,two")
    monkeypatch.setenv("LORAPLEX_ADAPTER_ROOTS", "/a,/b")
    settings = load(adapter=["x=/x", "y=/y=z"])
    assert settings.http_config().api_keys == {"one", "two"}
    assert settings.adapter_roots == (Path("/a"), Path("/b"))
    assert settings.named_adapters == {"x": "/x", "y": "/y=z"}


def test_keys_are_not_shown() -> None:
    assert "swordfish" not in repr(load(api_keys="swordfish"))


@pytest.mark.parametrize("absent", [None, []])
def test_flags_that_were_not_given_leave_the_environment_alone(absent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_ADAPTER", "a=x")
    assert load(adapter=absent).named_adapters == {"a": "x"}


def test_empty_variables_are_as_good_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", "")
    assert load().port == 8000


def test_variables_of_the_clients_are_no_settings_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://elsewhere")
    monkeypatch.setenv("LORAPLEX_API_KEY", "swordfish")
    assert load().api_keys == ()


def test_a_misspelt_variable_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_POOL_SIZE", "1")
    message = fault()
    assert "LORAPLEX_POOL_SIZE" in message
    assert "LORAPLEX_POOL_BYTES" in message


def test_a_misspelt_key_of_the_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("pool_size: 1\n", encoding="utf-8")
    message = fault(file)
    assert message.startswith("pool_size: no such setting")
    assert "pool_bytes" in message


@pytest.mark.parametrize("text", ["[", "- a\n- b\n", "port", "1"])
def test_a_file_that_holds_no_settings_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text, encoding="utf-8")
    assert str(file) in fault(file)


def test_an_empty_file_is_refused_and_a_missing_one_is_too(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    assert "empty.yaml" in fault(tmp_path / "empty.yaml")
    assert "none.toml" in fault(tmp_path / "none.toml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml" in fault(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("dtype", "int8", "'float32'"),
        ("device", "tpu", "'cuda'"),
        ("engine", "thread", "'inline'"),
        ("log_level", "loud", "'debug'"),
        ("log_format", "xml", "'json'"),
        ("port", "65536", "65535"),
        ("port", "-1", "0"),
        ("page_tokens", "0", "1"),
        ("page_tokens", "many", "integer"),
        ("memory_fraction", "1.5", "1"),
        ("memory_fraction", "0", "0"),
        ("pool_bytes", "lots", "8GiB"),
        ("pool_bytes", "0", "0"),
        ("host_adapter_bytes", "-1", "8GiB"),
        ("drain_seconds", "-1", "0"),
        ("max_mix_adapters", "0", "1"),
        ("max_mix_adapters", "65", "64"),
        ("max_routing_tokens", "0", "1"),
        ("expert_metrics", "-1", "0"),
        ("expert_metrics", "1001", "1000"),
        ("prefix_caching", "perhaps", "boolean"),
        ("loader_threads", "65", "64"),
        ("allow_bin", "perhaps", "boolean"),
        ("adapter", "upper", "NAME=PATH"),
        ("adapter", "=path", "NAME=PATH"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_setting(name: str, value: str, accepted: str) -> None:
    message = fault(**{name: value})
    assert message.startswith(f"{name}: ")
    assert accepted in message


def test_all_faults_are_told_at_once_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEYS", "swordfish")
    message = fault(port="x", dtype="y")
    assert "port: " in message
    assert "dtype: " in message
    assert "swordfish" not in message


def test_a_model_is_needed() -> None:
    with pytest.raises(SettingsError, match="model: "):
        load_settings({})


def test_the_model_is_called_after_its_folder_unless_named() -> None:
    assert load(model="/models/llama/").model_name == "llama"
    assert load(model="org/llama").model_name == "llama"
    assert load(served_model_name="mine").model_name == "mine"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1  # type: ignore[misc]


def test_the_engine_and_the_edge_get_their_shares(tmp_path: Path) -> None:
    settings = load(
        pool_bytes="1MiB",
        threads=3,
        max_model_len=99,
        allow_bin=True,
        stream_interval=7,
        adapter_roots=str(tmp_path),
        max_mix_adapters=3,
        max_routing_tokens=50,
        prefix_caching=False,
        expert_metrics=4,
    )
    engine = settings.engine_config()
    assert engine == EngineConfig(
        model="base",
        model_name="base",
        pool_bytes=1 << 20,
        threads=3,
        max_model_len=99,
        allow_bin=True,
        prefix_caching=False,
        expert_metrics=4,
    )
    edge = settings.http_config()
    assert (edge.model_name, edge.stream_interval, edge.adapter_roots) == ("base", 7, (tmp_path.resolve(),))
    assert (edge.max_mix_adapters, edge.max_routing_tokens) == (3, 50)


def test_defaults_of_the_engine_are_those_of_the_settings() -> None:
    assert load().engine_config() == EngineConfig(model="base", model_name="base")


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_a_watch_needs_a_folder_to_watch(tmp_path: Path) -> None:
    assert "'adapters'" in fault(watch=True)
    assert load(watch=True, adapters=tmp_path).watch_seconds == 5


def test_sources_allowed_over_http_are_checked_at_the_start() -> None:
    assert load(adapter_sources="s3://bucket/a/,hf://org").http_config().adapter_sources == (
        "s3://bucket/a/",
        "hf://org",
    )
    for source in ("/folder", "s3://user:secret@bucket", "http://host/a"):
        told = fault(adapter_sources=[source])
        assert told.startswith("adapter_sources: ")
        assert "secret" not in told


def test_the_engine_gets_its_share_of_the_tiers(tmp_path: Path) -> None:
    config = load(cache_dir=tmp_path, disk_cache_bytes="1GiB", eviction="lru", max_pinned_fraction=0.25).engine_config()
    assert (config.cache_dir, config.disk_cache_bytes, config.eviction) == (str(tmp_path), GIB, "lru")
    assert (config.max_pinned_fraction, config.prefetch) == (0.25, True)
    assert load().engine_config().cache_dir is None
    assert "max_pinned_fraction" in fault(max_pinned_fraction=1.5)
    assert "eviction" in fault(eviction="fifo")


@pytest.mark.parametrize(
    "address", ["collector:4318", "http://user:pass@host", "http://host?token=1", "grpc://host", ""]
)
def test_the_address_of_a_collector_holds_no_secret(address: str) -> None:
    with pytest.raises(SettingsError, match="otlp_endpoint: accepted is http://HOST:PORT") as failure:
        load_settings({"model": "m", "otlp_endpoint": address})
    assert "pass" not in str(failure.value)


def test_a_collector_may_have_a_path() -> None:
    assert load_settings({"model": "m", "otlp_endpoint": "https://host/otlp"}).otlp_endpoint == "https://host/otlp"
