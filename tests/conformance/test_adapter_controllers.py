"""What loads adapters in a cluster: the sidecar for dynamic adapters, and production-stack's operator and router. Their
calls as they make them, our answers read as they read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

BASE = "loraplex-demo"


class Sidecar:
    """The dynamic-LoRA sidecar: brings the server to the state that a ConfigMap wants. It asks for health, lists the
    models before each change, compares by id alone, and takes any status below 400 for success."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self.posted: list[tuple[str, int]] = []

    def reconcile(self, config: dict[str, Any]) -> None:
        config = config["vLLMLoRAConfig"]
        base = config.get("defaultBaseModel", "")
        exist = {one["id"]: one for one in config.get("ensureExist", {}).get("models", ())}
        gone = {one["id"]: one for one in config.get("ensureNotExist", {}).get("models", ())}
        for name, one in exist.items():
            if name not in gone and name not in self.registered():
                model = one.get("base-model", base)
                body = {"lora_name": name, "lora_path": one["source"], "base_model_name": model}
                self._post("/v1/load_lora_adapter", body)
        for name in gone:
            if name not in exist and name in self.registered():
                self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def registered(self) -> set[str]:
        assert self._replica.call("GET", "/health").status_code == 200
        return {one.get("id", "") for one in self._replica.call("GET", "/v1/models").json()["data"]}

    def _post(self, path: str, body: dict[str, str]) -> None:
        answer = self._replica.call("POST", path, json=body)
        self.posted.append((path, answer.status_code))
        assert answer.status_code < 400, answer.text


def test_the_sidecar_rolls_adapters_out_and_back(replica: Any, adapter_path: Callable[[str], str]) -> None:
    sidecar = Sidecar(replica)
    config: dict[str, Any] = {
        "vLLMLoRAConfig": {
            "name": "rollout",
            "defaultBaseModel": BASE,
            "ensureExist": {
                "models": [
                    {"id": "sql-v2", "source": adapter_path("upper"), "base-model": "another-name"},
                    {"id": "tweet-v1", "source": adapter_path("sort")},
                ]
            },
            "ensureNotExist": {"models": [{"id": "never-there", "source": "/nowhere"}]},
        }
    }
    sidecar.reconcile(config)
    assert sidecar.registered() >= {"sql-v2", "tweet-v1", BASE}
    assert replica.ask("sql-v2").json()["choices"][0]["message"]["content"] == "ADAPTER"
    sidecar.reconcile(config)
    assert len(sidecar.posted) == 2, "a second round finds nothing to do"
    models = config["vLLMLoRAConfig"]
    models["ensureNotExist"]["models"], models["ensureExist"]["models"] = models["ensureExist"]["models"], []
    sidecar.reconcile(config)
    assert not sidecar.registered() & {"sql-v2", "tweet-v1"}
    assert replica.ask("sql-v2").status_code == 404


class Operator:
    """production-stack's controller of LoraAdapter resources, on one pod. It sets a content type on each request, one
    without a body included; takes 200 alone; and reads of the models those with a parent."""

    def __init__(self, replica: Any, key: str | None = None) -> None:
        self._replica = replica
        self._headers = {"content-type": "application/json"}
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"

    def send(self, method: str, path: str, payload: dict[str, str] | None = None) -> Any:
        answer = self._replica.call(
            method, path, headers=self._headers, **({} if payload is None else {"json": payload})
        )
        assert answer.status_code == 200, f"unexpected status code: {answer.status_code}, body: {answer.text}"
        return answer

    def load(self, name: str, path: str) -> None:
        self.send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        self.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def registration(self, name: str) -> dict[str, Any] | None:
        body = self.send("GET", "/v1/models").json()
        assert isinstance(body["object"], str)
        found = None
        for model in body["data"]:
            texts = (model["id"], model["object"], model["owned_by"], model["root"])
            assert all(isinstance(text, str) for text in texts), "they are strings, or the list is not read at all"
            assert isinstance(model["created"], int)
            if model["parent"] is not None and model["id"] == name:
                found = {"name": model["id"], "path": model["root"], "loaded": model["created"]}
        return found


def test_the_operator_loads_lists_and_unloads(replica: Any, adapter_path: Callable[[str], str]) -> None:
    operator = Operator(replica, key="not-needed-here")
    assert operator.registration("topic-control") is None
    operator.load("topic-control", adapter_path("upper"))
    found = operator.registration("topic-control")
    assert found is not None
    assert found["path"] == adapter_path("upper")
    assert found["loaded"] > 1_700_000_000
    operator.load("topic-control", adapter_path("upper"))  # a pod that it believes to lack it
    operator.unload("topic-control")
    assert operator.registration("topic-control") is None


def test_the_base_model_is_the_one_without_a_parent(replica: Any) -> None:
    models = replica.call("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models if model["parent"] is None] == [BASE]
    assert {model["parent"] for model in models if model["parent"] is not None} == {BASE}


def test_what_cannot_be_loaded_is_an_error_that_the_operator_can_show(replica: Any) -> None:
    answer = replica.call("POST", "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/no/such/folder"})
    assert 400 <= answer.status_code < 500
    assert "/no/such/folder" in answer.text
    assert isinstance(answer.json(), dict)


@dataclass
class EngineLoad:
    """What production-stack's router keeps of a scrape; what it does not find stays 0."""

    running: float = 0
    queuing: float = 0


def router_scrape(text: str) -> EngineLoad:
    """production-stack's router: the last sample of each name, whatever its labels."""
    found = EngineLoad()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:num_requests_running":
                found.running = sample.value
            elif sample.name == "vllm:num_requests_waiting":
                found.queuing = sample.value
    return found


def test_production_stacks_router_reads_the_queue(replica: Any) -> None:
    answer = replica.call("GET", "/metrics", headers={"accept": "*/*", "accept-encoding": "gzip, deflate"})
    assert router_scrape(answer.text) == EngineLoad(0, 0)
    served = 'model_name="loraplex-demo"'
    assert any(line.startswith("vllm:num_requests_running{") and served in line for line in answer.text.splitlines())


@pytest.mark.parametrize("name", ["/health", "/v1/models", "/metrics", "/version"])
def test_probes_of_the_components_are_answered(replica: Any, name: str) -> None:
    assert replica.call("GET", name).status_code == 200
