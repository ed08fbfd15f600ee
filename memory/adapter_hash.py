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
    text = json.dumps({"kind": kind, "settings": settings}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(tensors_digest + text.encode()).hexdigest()
