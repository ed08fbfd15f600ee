"""An adapter read by the blueprint of another is the same as one that is read in full."""

from __future__ import annotations

import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loraplex.memory import adapter_blueprint, image_plan
from loraplex.memory.adapter_blueprint import Blueprints
from loraplex.memory.adapter_errors import AdapterFileError
from loraplex.memory.adapter_files import read_adapter
from loraplex.memory.adapter_image import build_image
from loraplex.memory.image_plan import ImagePlans
from loraplex.memory.store_states import content_of

LAYERS = 3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = {
    "plain": {"target_modules": ["q_proj", "k_proj", "down_proj"]},
    "all linears, ranks by pattern": {"target_modules": LINEARS, "rank_pattern": {"k_proj": 1}, "use_rslora": True},
    "head": {"target_modules": ["lm_head", "v_proj"], "save_options": {"save_embedding_layers": False}},
    "activated": {"target_modules": ["q_proj", "o_proj"], "alora_invocation_tokens": [5, 6]},
}
MIXTURES = ("mixlora", "mola", "loramoe", "meteora")


def sibling(folder: Path, name: str = "sibling", dtype: torch.dtype | None = None) -> Path:
    """The same recipe with other values."""
    other = folder.parent / name
    shutil.copytree(folder, other)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(len(name))
    changed = {key: torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
    with safe_open(folder / PATH, "pt") as file:
        metadata = file.metadata()
    save_file({key: value.to(dtype or tensors[key].dtype) for key, value in changed.items()}, other / PATH, metadata)
    return other


PATH = "adapter_model.safetensors"


@pytest.fixture
def read(base_shape, base_weights):
    def run(folder, blueprints=None, dtype=torch.float32, **options):
        options = {"base_weights": base_weights, "base_name": "base", **options}
        return read_adapter(folder, base_shape, dtype=dtype, blueprints=blueprints, **options)

    return run


def assert_same(found, expected):
    assert len(found.pairs) == len(expected.pairs)
    for one, other in zip(found.pairs, expected.pairs):
        assert (one.site, one.layer, one.expert, one.scale) == (other.site, other.layer, other.expert, other.scale)
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)
        assert one.gain is other.gain is None
    assert [(router.layer, router.site) for router in found.routers] == [(r.layer, r.site) for r in expected.routers]
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(found.routers, expected.routers))
    for name in ("identity", "kind", "warnings", "routing", "token_routes", "invocation"):
        assert getattr(found, name) == getattr(expected, name), name


def check_sibling(read, folder, dtype=torch.float32, stored=None):
    """The second adapter of a recipe, by blueprint and by plan, is what it is on its own."""
    if stored is not None:
        folder = sibling(folder, "first", stored)
    other = sibling(folder)
    blueprints, plans = Blueprints(), ImagePlans(LAYERS, 256, dtype)
    first = read(folder, blueprints, dtype)
    assert first.values is not None
    found, expected = read(other, blueprints, dtype), read(other, dtype=dtype)
    assert found.values is not None
    assert found.values.structure is first.values.structure
    assert found.identity != first.identity
    assert_same(found, expected)
    image = build_image(expected, LAYERS, 256, dtype)
    plan = plans.plan(first)
    assert plans.plan(found) is plan
    parts = tuple(torch.full_like(part, math.nan) for part in (image.parts[0][:1], image.parts[0][1:]))
    built = plans.build(found, plan, parts, "room")
    # By their bits: routers are float32 in an image of any dtype.
    assert torch.equal(built.data.view(torch.uint8), image.data.view(torch.uint8))
    assert (built.identity, built.kind, built.layout, built.room) == (image.identity, image.kind, image.layout, "room")
    assert (built.routing, built.invocation) == (image.routing, image.invocation)
    said = content_of(expected, LAYERS, image.num_pages, 0)
    assert replace(plan.content, identity=said.identity, warnings=said.warnings) == said
    return plan


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
def test_a_sibling_is_read_and_laid_out_as_it_is_on_its_own(read, save_peft, stored, served):
    plan = check_sibling(read, save_peft(**PEFT["all linears, ranks by pattern"])[0], served, stored)
    assert plan.copies is not None


@pytest.mark.parametrize("options", PEFT.values(), ids=list(PEFT))
def test_every_kind_of_plain_pairs_has_blueprints(read, save_peft, options):
    check_sibling(read, save_peft(**options)[0])


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
def test_mixtures_have_blueprints(read, save_mixture, family, served):
    check_sibling(read, save_mixture(family), served)


def test_long_matrices_are_copied_in_pieces(read, save_peft, monkeypatch):
    monkeypatch.setattr(image_plan, "SERIAL_ELEMENTS", 50)
    plan = check_sibling(read, save_peft(**PEFT["plain"])[0], torch.bfloat16)
    assert plan.copies is not None
    assert len(plan.copies) > 2 * 3 * LAYERS
    assert all(group[-1].end - group[0].offset <= 50 for group in plan.copies)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_is_found_and_its_tensor_named(read, save_peft, edit_tensors, bad):
    folder, _ = save_peft(**PEFT["plain"])
    blueprints = Blueprints()
    read(folder, blueprints)
    key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    edit_tensors(folder, lambda tensors: tensors[key].view(-1)[3].fill_(bad))
    with pytest.raises(AdapterFileError, match="NaN or infinite") as caught:
        read(folder, blueprints)
    assert caught.value.key == key


def test_a_value_beyond_the_served_range_is_refused(read, save_peft, edit_tensors):
    folder, _ = save_peft(**PEFT["plain"])
    blueprints = Blueprints()
    read(folder, blueprints, torch.float16)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors[key].view(-1)[0].fill_(1e5))
    with pytest.raises(AdapterFileError, match="do not fit"):
        read(folder, blueprints, torch.float16)


def test_other_configurations_are_other_recipes(read, save_peft, edit_config):
    folder, _ = save_peft(**PEFT["plain"])
    blueprints = Blueprints()
    first = read(folder, blueprints)
    edit_config(folder, lora_alpha=77)
    second = read(folder, blueprints)
    assert second.identity != first.identity
    assert second.pairs[0].scale == 77 / 4
    edit_config(folder, r=5)
    with pytest.raises(AdapterFileError, match="configured rank"):
        read(folder, blueprints)


def test_other_headers_are_other_recipes(read, save_peft, edit_tensors):
    folder, _ = save_peft(**PEFT["plain"])
    blueprints = Blueprints()
    read(folder, blueprints)
    edit_tensors(folder, lambda tensors: tensors.pop("base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"))
    with pytest.raises(AdapterFileError, match="missing"):
        read(folder, blueprints)


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data + b"\0\0", lambda data: data[:4]])
def test_a_file_of_another_length_is_corrupt(read, save_peft, change):
    folder, _ = save_peft(**PEFT["plain"])
    blueprints = Blueprints()
    read(folder, blueprints)
    path = folder / PATH
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(AdapterFileError, match="corrupt"):
        read(folder, blueprints)


def test_dora_is_read_in_full(read, save_peft):
    folder, _ = save_peft(target_modules=["q_proj"], use_dora=True)
    assert read(folder, Blueprints()).values is None


def test_tables_of_routes_are_made_for_each_adapter(read, save_mixture):
    folder = save_mixture("tokenwise")
    assert read(folder, Blueprints()).values is None


def test_copies_of_the_base_are_compared_each_time(read, save_peft):
    folder, _ = save_peft(target_modules=["embed_tokens", "q_proj"], save_options={"save_embedding_layers": True})
    blueprints = Blueprints()
    assert read(folder, blueprints).values is None
    with pytest.raises(AdapterFileError, match="differs from the served base"):
        read(sibling(folder), blueprints)


def test_mixed_dtypes_are_read_in_full(read, save_peft, edit_tensors):
    folder, _ = save_peft(**PEFT["plain"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].half()}))
    assert read(folder, Blueprints()).values is None


def test_warnings_are_those_of_a_full_read(read, save_peft, edit_config):
    folder, _ = save_peft(**PEFT["plain"])
    edit_config(folder, base_model_name_or_path="another-base")
    blueprints = Blueprints()
    first, second = read(folder, blueprints), read(sibling(folder), blueprints)
    assert first.warnings == second.warnings != ()


def test_the_recipes_that_were_read_longest_ago_are_forgotten(read, save_peft, edit_config):
    folder, _ = save_peft(**PEFT["plain"])
    blueprints = Blueprints(limit=2)
    structures = []
    for alpha in (1, 2, 1, 3, 1, 2):
        edit_config(folder, lora_alpha=alpha)
        values = read(folder, blueprints).values
        assert values is not None
        structures.append(values.structure)
    one, two, one_again, _, kept, two_again = structures
    assert one is one_again is kept
    assert two is not two_again


def test_huge_headers_are_not_kept(read, save_peft, monkeypatch):
    monkeypatch.setattr(adapter_blueprint, "_LONGEST_KEY", 100)
    folder, _ = save_peft(**PEFT["plain"])
    assert read(folder, Blueprints()).values is None


def test_several_threads_share_blueprints_and_plans(read, save_peft):
    folder, _ = save_peft(**PEFT["all linears, ranks by pattern"])
    folders = [sibling(folder, "s" * (index + 1)) for index in range(4)]
    expected = [build_image(read(one), LAYERS, 256, torch.float32).data for one in folders]
    blueprints, plans, wrong = Blueprints(), ImagePlans(LAYERS, 256, torch.float32), []

    def work(index):
        for _ in range(20):
            spec = read(folders[index], blueprints)
            parts = (torch.full_like(expected[index], math.nan),)
            if not torch.equal(plans.build(spec, plans.plan(spec), parts, None).data, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
