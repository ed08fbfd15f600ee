"""Who asks: a tenant is the name of an API key, and may have several keys, so that they can be changed one by one."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

DEFAULT_TENANT = "default"
"""Of keys without a name, and of everybody where no key is asked for."""
ACCEPTED_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class TenantKey:
    """One key of a tenant. The key is in no ``repr``."""

    tenant: str
    key: str = field(repr=False)


def parse_tenant_keys(entries: Sequence[str]) -> tuple[TenantKey, ...]:
    """Keys from entries of the form NAME:KEY; the key may hold colons.

    Raises:
        ValueError: an entry is none, or two tenants have the same key. The message tells its place in the list, and
            never what it holds: that may be the key.
    """
    keys: dict[str, TenantKey] = {}
    for at, entry in enumerate(entries, start=1):
        name, colon, key = entry.partition(":")
        if not colon or not key:
            raise ValueError(f"entry {at} is not NAME:KEY")
        if ACCEPTED_NAME.fullmatch(name) is None:
            raise ValueError(
                f"the name in entry {at} must be 1 to 63 of a-z, 0-9, '_', '.' and '-', and not begin with a sign"
            )
        if key != key.strip():
            raise ValueError(f"the key in entry {at} begins or ends with a blank")
        if keys.setdefault(key, TenantKey(name, key)).tenant != name:
            raise ValueError(f"the key in entry {at} is that of another tenant, too")
    return tuple(keys.values())


class Tenants:
    """Knows tenants by their keys.

    Args:
        unnamed: keys without a name.
        named: keys with one.

    Attributes:
        names: of all tenants that can ask, sorted.
    """

    def __init__(self, unnamed: Iterable[str], named: Iterable[TenantKey]) -> None:
        pairs = [(key, DEFAULT_TENANT) for key in unnamed] + [(one.key, one.tenant) for one in named]
        self._keys = [(key.encode(), tenant) for key, tenant in pairs]
        self.names = tuple(sorted({tenant for _, tenant in self._keys} or {DEFAULT_TENANT}))

    @property
    def asks_for_keys(self) -> bool:
        """Whether there are keys at all; if not, everybody is let in."""
        return bool(self._keys)

    def of_key(self, given: str) -> str | None:
        """The tenant with that key. Compares with every key, in a time that does not tell which one it was."""
        token = given.encode()
        found = [tenant for key, tenant in self._keys if hmac.compare_digest(token, key)]
        return found[0] if found else None
