"""The setting ``attention``: which kernels it takes and how it reaches the engine."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import torch

from loraplex.kernels.flashinfer_attention import choose_attention
from loraplex.server.engine_config import AttentionName, EngineConfig
from loraplex.server.settings import SettingsError, load_settings


def test_triton_is_used_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPLEX_ATTENTION", raising=False)
    config = load_settings({"model": "base"}).engine_config()
    assert config.attention == EngineConfig(model="base").attention == "auto"
    assert choose_attention(config.attention, torch.device("cuda")) == "triton"


@pytest.mark.parametrize("name", typing.get_args(AttentionName))
def test_the_engine_is_told_what_was_asked_for(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings({"model": "base", "attention": name}).engine_config().attention == name
    file = tmp_path / "server.yaml"
    file.write_text(f"attention: {name}\n", encoding="utf-8")
    assert load_settings({"model": "base"}, file).engine_config().attention == name
    monkeypatch.setenv("LORAPLEX_ATTENTION", name)
    assert load_settings({"model": "base"}).engine_config().attention == name


def test_other_kernels_are_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match="attention: Input should be 'auto', 'triton' or 'flashinfer'"):
        load_settings({"model": "base", "attention": "flash"})
