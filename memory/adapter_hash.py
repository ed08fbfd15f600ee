"""The identity of an adapter: what it computes, not what it is called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def adapter_identity(kind: str, tensors_digest: bytes, settings: Mapping[str, object]) -> str:
    """SHA-256, in hex, over the kind, the digest of the tensors' file and the settings that matter at inference.

    A comment or another base path in the configuration leaves the identity as it is; a byte of the tensors' file or a
    scale does not. The order of a list in ``settings`` counts, the order of its keys does not.
    """
    return identity_from(tensors_digest, settings_text(kind, settings))


def settings_text(kind: str, settings: Mapping[str, object]) -> bytes:
    """What of the configuration enters the identity."""
    text = json.dumps({"kind": kind, "settings": settings}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def identity_from(tensors_digest: bytes, text: bytes) -> str:
    """The identity, from what ``settings_text`` gives."""
    return hashlib.sha256(tensors_digest + text).hexdigest()
