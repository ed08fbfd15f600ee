"""All settings of a server in one frozen tree: command-line flags over environment over a file over defaults."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
import yaml
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_source import allowed_sources
from loraplex.server.engine_config import (
    AttentionName,
    DeviceName,
    DtypeName,
    EngineConfig,
    EvictionName,
    KernelsName,
)
from loraplex.server.errors import InvalidRequestError
from loraplex.server.http_config import HttpConfig, MetricsCompat
from loraplex.server.tenants import parse_tenant_keys

PREFIX = "LORAPLEX_"
_HTTP_ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
CLIENT_VARIABLES = frozenset({"LORAPLEX_URL", "LORAPLEX_API_KEY"})
"""Read by the clients, not by the server."""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]


class SettingsError(InvalidRequestError):
    """A setting is unknown or has a bad value; the message says which and what is accepted."""

    default_code = "settings"


class Settings(BaseSettings):
    """Settings of ``loraplex serve``: each is a flag, an environment variable, and a key of the settings file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = Field(description="Folder of a Hugging Face checkpoint, or a hub id where there is a network.")
    served_model_name: str | None = Field(
        None, description="Name of the base model in the API; its folder's name if absent."
    )
    adapters: Path | None = Field(
        None, description="Folder of adapter folders; each is registered under its folder's name."
    )
    adapter: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="A single adapter as NAME=PATH; may be given several times."
    )
    adapter_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders below which adapters may be loaded over HTTP; none means anywhere."
    )
    adapter_sources: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Beginnings of addresses that adapters may be loaded from over HTTP, such as s3://bucket/adapters/ "
        "or hf://organisation/; none means no remote source at all.",
    )
    watch: bool = Field(
        False, description="Look for new, changed and removed folders in `adapters` while serving, and follow them."
    )
    watch_seconds: float = Field(
        5.0, gt=0, description="Time between two looks. A change counts once two looks in a row have found it."
    )
    state_dir: Path | None = Field(
        None,
        description="Folder for what was registered, uploaded, pinned or tagged over HTTP, so that it survives a "
        "restart; of one server alone. If absent, nothing survives and nothing can be uploaded.",
    )
    max_adapter_bytes: ByteSize = Field(ByteSize(2 << 30), gt=0, description="Largest upload, packed and unpacked.")
    max_uploads: int = Field(8, ge=1, description="Uploads at once; one more is a 429.")
    allow_bin: bool = Field(
        False, description="Also read adapter_model.bin (with weights_only); off because it is pickle."
    )

    dtype: DtypeName = Field("auto", description="auto: the checkpoint's, or float32 on a CPU without fast bfloat16.")
    device: DeviceName = Field("auto", description="auto: cuda where there is one and this version has kernels for it.")
    kernels: KernelsName = Field(
        "auto",
        description="What steps run by; auto: triton on CUDA where Triton is installed, else plain, which is PyTorch's "
        "operators and slow on a GPU.",
    )
    attention: AttentionName = Field(
        "auto",
        description="Attention on CUDA; auto: triton, the same to the last bit in any batch. flashinfer is not, and "
        "has to be installed.",
    )
    graphs: bool = Field(True, description="Replay steps that only decode from CUDA graphs; off to look for faults.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads for the model; all cores that the container may use if absent.",
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest context in tokens; the model's own if absent.")

    pool_bytes: ByteSize | None = Field(
        None, gt=0, description="Size of the pool that K/V and adapters share, e.g. 8GiB."
    )
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Size of the pool as a share of the memory left after the weights and, on CUDA, after what steps "
        "need; if no pool_bytes. 0.9 on CUDA and 0.5 on a CPU if absent.",
    )
    graph_rank: int = Field(
        16,
        ge=0,
        le=512,
        description="On CUDA: rank of adapters that decoding is captured for at the start. Larger ones are served too; "
        "the first of them makes graphs be captured again.",
    )
    page_tokens: int = Field(16, ge=1, le=1024, description="Tokens whose K/V a page holds.")
    host_adapter_bytes: ByteSize = Field(
        ByteSize(4 << 30), gt=0, description="Host memory for adapters that are not in the pool."
    )
    loader_threads: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Threads that read and verify adapters, and further ones while those wait for files; one for every "
        "four cores, at most eight, if absent.",
    )
    cache_dir: Path | None = Field(
        None, description="Folder for adapters fetched from remote sources; below the user's cache folder if absent."
    )
    disk_cache_bytes: ByteSize = Field(ByteSize(20 << 30), gt=0, description="Most that the fetched adapters may take.")
    remote_timeout_seconds: float = Field(
        60.0, gt=0, description="Longest silence of a remote source before a fetch counts as failed."
    )
    eviction: EvictionName = Field(
        "value",
        description="What goes first where room is wanted: value, what is worth least for its size (time to rebuild "
        "times chance of reuse); lru, what has been idle for longest.",
    )
    max_pinned_fraction: float = Field(0.5, ge=0, le=1, description="Share of the pool that pinned adapters may take.")
    prefetch: bool = Field(
        True, description="Bring adapters of waiting requests, and likely ones, up before their turn comes."
    )

    max_batch_tokens: int = Field(2048, ge=1, description="Tokens computed in one step.")
    max_running: int = Field(256, ge=1, description="Sequences that run at once.")
    max_waiting: int = Field(4096, ge=1, description="Sequences that may wait; more are refused with 429.")
    prefill_chunk: int = Field(512, ge=1, description="Prompt tokens of one sequence computed in one step.")
    prefix_caching: bool = Field(
        True, description="Keep the K/V of finished sequences for prompts that begin alike, while there is room."
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Accepted bearer tokens, separated by commas; none means open to all."
    )
    tenant_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="Accepted bearer tokens with the tenant that the metrics and the log name, as NAME:KEY; a tenant "
        "may have several. Keys of `api_keys`, and everybody where there are no keys, are the tenant `default`.",
    )
    max_body_bytes: ByteSize = Field(ByteSize(32 << 20), gt=0, description="Largest request body.")
    stream_interval: int = Field(1, ge=1, description="Tokens per streamed event.")
    strict_requests: bool = Field(
        False, description="Refuse unknown request fields instead of naming them in a header."
    )
    max_mix_adapters: int = Field(8, ge=1, le=64, description="Most adapters in the weighted list of one request.")
    max_routing_tokens: int = Field(
        4096, ge=1, description="Most tokens, of prompts and choices, of a request with return_routing."
    )
    drain_seconds: float = Field(30.0, ge=0, description="How long open requests may go on after SIGTERM.")
    linger_seconds: float = Field(
        0.0,
        ge=0,
        description="How long new work is still taken after SIGTERM, before drain_seconds begin: load balancers see "
        "that the server is not ready, and connections are closed with their answers.",
    )

    expert_metrics: int = Field(
        0, ge=0, le=1000, description="Adapters whose experts are counted in the metrics: those most used; 0 is none."
    )
    max_adapter_series: int = Field(
        100, ge=0, le=100_000, description="Most adapters that the metrics tell of by name."
    )
    metrics_compat: MetricsCompat = Field(
        "none",
        description="vllm: also the metrics that cluster routers read of vLLM, under its names (docs/routing.md).",
    )
    slo_order: bool = Field(
        True,
        description="Let waiting requests in by when their first token is due: the milliseconds of x-slo-ttft-ms after "
        "their arrival, or two seconds.",
    )
    engine: Literal["process", "inline"] = Field("process", description="inline runs the engine in the HTTP process.")
    log_level: LogLevel = Field("info", description="Least severe messages to log.")
    log_format: LogFormat = Field("console", description="json writes one object a line.")
    access_log: bool = Field(True, description="Log a line for each request; those of probes at level debug.")
    otlp_endpoint: str | None = Field(
        None,
        description="Address of an OpenTelemetry collector that traces are sent to (OTLP over HTTP), such as "
        "http://collector:4318; needs the extra `otel`. If absent, OTEL_EXPORTER_OTLP_ENDPOINT counts.",
    )

    @field_validator("adapter", "adapter_roots", "adapter_sources", "api_keys", "tenant_keys", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, equals, path = entry.partition("=")
            if not (name and equals and path):
                raise ValueError(f"{entry!r} is not NAME=PATH")
        return value

    @field_validator("adapter_sources")
    @classmethod
    def _check_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            allowed_sources(value)
        except AdapterFileError as error:
            raise ValueError(error.message.removeprefix("adapter_sources: ")) from error
        return value

    @field_validator("tenant_keys")
    @classmethod
    def _check_tenant_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        parse_tenant_keys([entry.get_secret_value() for entry in value])
        return value

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        config = self.http_config()
        if any(one.key in config.api_keys for one in config.tenant_keys):
            raise PydanticCustomError("keys", "a key must not be in 'api_keys' and in 'tenant_keys'")
        return self

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is not None and _HTTP_ADDRESS.fullmatch(value) is None:
            raise ValueError(
                "accepted is http://HOST:PORT or https://HOST:PORT with or without a path; no user, no query"
            )
        return value

    @model_validator(mode="after")
    def _check_watch(self) -> Self:
        if self.watch and self.adapters is None:
            raise PydanticCustomError("watch", "watch needs 'adapters', the folder to watch")
        return self

    @property
    def model_name(self) -> str:
        """What the base model is called in the API."""
        return self.served_model_name or Path(self.model).name or self.model

    @property
    def named_adapters(self) -> dict[str, str]:
        """The single adapters: name to path."""
        return dict(entry.partition("=")[::2] for entry in self.adapter)

    def engine_config(self) -> EngineConfig:
        """The engine's share."""
        shared = set(EngineConfig.__struct_fields__) & set(type(self).model_fields)
        values = {name: getattr(self, name) for name in shared}
        values["model_name"] = self.model_name
        return msgspec.convert({name: _plain(value) for name, value in values.items()}, EngineConfig)

    def http_config(self) -> HttpConfig:
        """The HTTP edge's share."""
        return HttpConfig(
            model_name=self.model_name,
            api_keys=frozenset(key.get_secret_value() for key in self.api_keys),
            tenant_keys=parse_tenant_keys([entry.get_secret_value() for entry in self.tenant_keys]),
            max_body_bytes=int(self.max_body_bytes),
            adapter_roots=tuple(root.resolve() for root in self.adapter_roots),
            adapter_sources=self.adapter_sources,
            max_adapter_bytes=int(self.max_adapter_bytes),
            max_uploads=self.max_uploads,
            stream_interval=self.stream_interval,
            strict_requests=self.strict_requests,
            max_mix_adapters=self.max_mix_adapters,
            max_adapter_series=self.max_adapter_series,
            metrics_compat=self.metrics_compat,
            slo_order=self.slo_order,
            max_routing_tokens=self.max_routing_tokens,
            drain_seconds=self.drain_seconds,
            access_log=self.access_log,
        )


def _plain(value: Any) -> Any:
    """A value as it crosses to the engine."""
    if isinstance(value, Path):
        return str(value.absolute())
    return int(value) if isinstance(value, ByteSize) else value


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Settings from flags, the environment and a file, in this order of precedence.

    Args:
        flags: by setting; None values count as absent.
        file: YAML or TOML.

    Raises:
        SettingsError: an unknown setting, or a bad value.
    """
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    from_file = _read_file(file) if file is not None else {}

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    _check_environment()
    try:
        return Sourced(**given)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _read_file(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{file} cannot be read: {error}", param="config") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold settings as keys and values", param="config")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _check_environment() -> None:
    """Refuse misspelt variables: they would be ignored without a word."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    for variable in os.environ:
        if variable.upper().startswith(PREFIX) and variable.upper() not in known:
            raise SettingsError(
                f"environment variable {variable} is not a setting; known are {', '.join(sorted(known))}"
            )


def _explain(error: ValidationError) -> str:
    """One line for each fault, without repeating values: they may be secret."""
    lines = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"no such setting; known are {', '.join(sorted(Settings.model_fields))}"
        elif fault["type"] == "missing":
            message = f"required. {Settings.model_fields[name].description}"
        elif fault["type"] in {"byte_size", "byte_size_unit"}:
            message = "Input should be a number of bytes, alone or with a unit as in 8GiB or 500MB"
        lines.append(f"{name}: {message}")
    return "; ".join(lines)
