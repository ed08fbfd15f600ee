"""Puts the tiers of adapters together: sources, disk cache, host store, pool."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from loraplex.memory.adapter_cache import AdapterCache
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_spec import BaseShape, BaseWeights
from loraplex.memory.adapter_store import AdapterStore
from loraplex.memory.arena import PageShape
from loraplex.memory.arrival_rates import ArrivalRates
from loraplex.memory.disk_cache import DiskCache
from loraplex.memory.eviction_order import EvictionOrder, LruOrder, ValueOrder
from loraplex.memory.kv_cache import KvCache
from loraplex.memory.page_pool import PagePool
from loraplex.memory.prefix_cache import PrefixCache
from loraplex.memory.source_reader import SourceReader
from loraplex.memory.source_remotes import Remotes
from loraplex.memory.store_reading import bounded_reader
from loraplex.server.cores import usable_cores
from loraplex.server.engine_config import EngineConfig
from loraplex.server.errors import EngineStartError
from loraplex.server.host_directory import HostDirectory
from loraplex.server.rebuild_costs import RebuildCosts

_log = structlog.get_logger(__name__)

_SLOW_MEMORY_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Tiers:
    """Where adapters and K/V are kept, and by which measures they go.

    Attributes:
        pool_rates: how often each adapter is wanted, as the pool remembers it, where things come and go in seconds.
        rates: the same over minutes, as the slower tiers remember it.
    """

    pool: PagePool
    kv: KvCache
    adapters: AdapterCache
    store: AdapterStore
    directory: HostDirectory
    pool_rates: ArrivalRates
    rates: ArrivalRates
    costs: RebuildCosts
    cache: DiskCache | None


def build_tiers(
    config: EngineConfig,
    base: BaseShape,
    base_weights: BaseWeights,
    shape: PageShape,
    num_pages: int,
    *,
    pin_memory: bool,
    on_release: Callable[[list[int]], None] | None = None,
    on_change: Callable[[], None] | None = None,
) -> Tiers:
    """Make the tiers of one engine.

    Args:
        config: limits.
        base: what the served base offers to adapters.
        base_weights: of the served base.
        shape, num_pages: of the pool.
        pin_memory: hold images in page-locked memory.
        on_release: see ``PagePool``.
        on_change: called from a loader thread when an adapter has been read.

    Raises:
        EngineStartError: the folder of the disk cache cannot be used.
    """
    pool_rates, rates = ArrivalRates(), ArrivalRates(_SLOW_MEMORY_SECONDS)
    cache = _open_cache(config)
    sources = SourceReader(cache)
    reader = bounded_reader(
        sources,
        base,
        shape.dtype,
        config.host_adapter_bytes,
        allow_bin=config.allow_bin,
        base_name=(config.model_name or config.model, config.model),
        base_weights=base_weights,
    )
    store = AdapterStore(
        base,
        shape.page_elems,
        shape.dtype,
        byte_limit=config.host_adapter_bytes,
        threads=config.loader_threads or loader_threads(usable_cores()),
        pin_memory=pin_memory,
        reader=reader,
        rates=rates,
        order=_order(config),
        on_change=on_change,
    )
    sources.expected = store.expected
    costs = RebuildCosts(store, shape.page_tokens, shape.page_bytes)
    pool = PagePool(num_pages, on_release=on_release, order=_order(config))
    adapters = AdapterCache(pool, pool_rates, costs.of_adapter)
    kv = KvCache(pool, shape.page_tokens, PrefixCache(pool, pool_rates, costs.of_page))
    directory = HostDirectory(store, adapters, num_pages, base.num_layers, sources.expire, sources.last_fetch)
    return Tiers(pool, kv, adapters, store, directory, pool_rates, rates, costs, cache)


def loader_threads(num_cores: int) -> int:
    """How many read adapters at once where no setting says so.

    What reads from the page cache takes a core from the operators and the interpreter from the step loop: on two cores,
    two at once cost the steps more than one after another. Those that wait for a disk or a remote get help.
    """
    return min(8, max(1, num_cores // 4))


def _order(config: EngineConfig) -> EvictionOrder:
    return ValueOrder() if config.eviction == "value" else LruOrder()


def _open_cache(config: EngineConfig) -> DiskCache | None:
    """The disk cache; None where nobody named a folder for it and the usual one cannot be used."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex" / "adapters"
    folder = usual if config.cache_dir is None else Path(config.cache_dir)
    remotes = Remotes(allow_bin=config.allow_bin, timeout_seconds=config.remote_timeout_seconds)
    try:
        # What was fetched is served until somebody loads it again: a registration does not change under its users.
        return DiskCache(folder, config.disk_cache_bytes, remotes, order=_order(config), check_seconds=float("inf"))
    except AdapterFileError as error:
        if config.cache_dir is not None:
            raise EngineStartError(error.message, param="cache_dir") from error
        _log.warning("remote adapters cannot be served: their cache folder cannot be used", error=error.message)
        return None
