"""Adapters as an operator of a cluster handles them: over each server's own API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
from kubectl import Pod

LOADED = "loaded-by-operator"
UPLOADED = "uploaded"
WORD = "kernel"
ANSWERS = {LOADED: "KERNEL", UPLOADED: "lenrek"}
DEMO = Path(__file__).resolve().parents[3] / "server" / "demo" / "adapters"


def load_and_upload(pod: Pod) -> None:
    """Load one adapter by the operators' call, of a folder that the server has, and upload another."""
    with httpx2.Client(base_url=pod.url, timeout=60) as client:
        path = client.get("/v1/adapters/upper").raise_for_status().json()["path"]
        body = {"lora_name": LOADED, "lora_path": path}
        client.post("/v1/load_lora_adapter", json=body).raise_for_status()
        files = {
            name: (DEMO / "reverse" / name).read_bytes()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        client.post("/v1/adapters", data={"id": UPLOADED}, files=files).raise_for_status()


def answer(pod: Pod, adapter: str) -> str:
    """What a server makes of the word with an adapter, or the error that it answers."""
    body = {"model": adapter, "messages": [{"role": "user", "content": WORD}], "temperature": 0}
    response = httpx2.post(f"{pod.url}/v1/chat/completions", json=body, timeout=60)
    if response.status_code != 200:
        return f"{response.status_code}: {response.text[:200]}"
    shown: dict[str, Any] = response.json()
    return str(shown["choices"][0]["message"]["content"])


def check(pods: list[Pod]) -> None:
    """Every server has both adapters, and they do what they should.

    Raises:
        AssertionError: one does not.
    """
    for pod in pods:
        given = {adapter: answer(pod, adapter) for adapter in ANSWERS}
        assert given == ANSWERS, f"{pod.name}: {given}"
