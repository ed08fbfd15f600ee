"""The slab: every block has one owner, parts are whole layers, and room is found wherever there is some."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraplex.memory import host_slab
from loraplex.memory.host_slab import HostSlab, SlabRoom

ELEMS = 128
BLOCK = ELEMS * 4


def slab_of(num_blocks: int) -> HostSlab:
    return HostSlab(num_blocks * BLOCK, ELEMS, torch.float32)


def test_the_limit_is_rounded_down_to_blocks():
    slab = HostSlab(3 * BLOCK + BLOCK - 1, ELEMS, torch.float32)
    assert (slab.num_blocks, slab.num_free, slab.used_bytes) == (3, 3, 0)


@pytest.mark.parametrize("num_bytes", [0, BLOCK - 1])
def test_a_slab_without_a_block_has_no_room(num_bytes):
    assert HostSlab(num_bytes, ELEMS, torch.float32).allocate(1, 1) is None


def test_more_than_the_machine_gives_is_refused_with_the_number():
    with pytest.raises(ValueError, match=f"byte_limit: {1 << 60} bytes"):
        HostSlab(1 << 60, ELEMS, torch.float32)


def test_an_image_is_one_part_where_there_is_a_run():
    slab = slab_of(12)
    room = slab.allocate(3, 4)
    assert room is not None
    assert [tuple(part.shape) for part in room.parts] == [(3, 4, ELEMS)]
    assert slab.allocate(1, 1) is None
    del room
    assert slab.num_free == 12


def test_scattered_blocks_are_used_in_whole_layers():
    slab = slab_of(12)
    small = [slab.allocate(1, 3) for _ in range(4)]
    del small[2], small[0]
    room = slab.allocate(3, 2)
    assert room is None, "two runs of three blocks hold two layers of two"
    room = slab.allocate(2, 2)
    assert room is not None
    assert [tuple(part.shape) for part in room.parts] == [(1, 2, ELEMS)] * 2
    assert slab.num_free == 2


def test_neighbouring_runs_become_one_part():
    slab = slab_of(8)
    rooms = [slab.allocate(1, 2) for _ in range(4)]
    del rooms[1:3]
    room = slab.allocate(2, 2)
    assert room is not None
    assert len(room.parts) == 1


def test_blocks_come_back_when_the_last_who_holds_them_lets_go():
    returned = []
    slab = HostSlab(4 * BLOCK, ELEMS, torch.float32, on_return=lambda: returned.append(1))
    room = slab.allocate(2, 2)
    other = room
    del room
    assert slab.num_free == 0
    assert not returned
    del other
    assert slab.num_free == 4
    assert returned == [1]


sizes = st.tuples(st.integers(1, 5), st.integers(1, 6))


@settings(deadline=None, max_examples=100)
@given(existing=st.lists(st.tuples(sizes, st.booleans()), max_size=12), wanted=sizes)
def test_there_is_room_exactly_where_the_gaps_hold_the_layers(existing, wanted):
    slab = slab_of(40)
    rooms = [(slab.allocate(*size), stays) for size, stays in existing]
    left = [room for room, stays in rooms if stays and room is not None]
    fits = slab.would_fit(*wanted, left)
    del rooms
    room = slab.allocate(*wanted)
    assert (room is not None) == fits
    slab.check_integrity([*left, room] if room is not None else left)


class SlabMachine(RuleBasedStateMachine):
    """Random images come and go; each writes its own number everywhere, and finds it there."""

    def __init__(self) -> None:
        super().__init__()
        self.slab = slab_of(64)
        self.rooms: dict[int, SlabRoom] = {}
        self.count = 0

    @rule(size=sizes)
    def allocate(self, size):
        layers, pages = size
        room = self.slab.allocate(layers, pages)
        free = 64 - sum(known.num_blocks for known in self.rooms.values())
        if room is None:
            assert not self.slab.would_fit(layers, pages, self.rooms.values())
            return
        assert layers * pages <= free
        assert sum(part.shape[0] for part in room.parts) == layers
        assert len(room.parts) <= layers
        for part in room.parts:
            assert part.shape[1:] == (pages, ELEMS)
            assert part.is_contiguous()
            part.fill_(self.count)
        self.rooms[self.count] = room
        self.count += 1

    @precondition(lambda self: self.rooms)
    @rule(data=st.data())
    def let_go(self, data):
        del self.rooms[data.draw(st.sampled_from(sorted(self.rooms)))]

    @invariant()
    def blocks_have_one_owner_and_keep_what_it_wrote(self):
        self.slab.check_integrity(self.rooms.values())
        used = sum(room.num_blocks for room in self.rooms.values())
        assert self.slab.used_bytes == used * BLOCK
        assert self.slab.num_free == 64 - used
        for number, room in self.rooms.items():
            assert all((part == number).all() for part in room.parts)


SlabMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_random_use_keeps_the_slab_sound = SlabMachine.TestCase


class FakeRuntime:
    def __init__(self, result: int) -> None:
        self.result, self.calls = result, []

    def cudaHostRegister(self, *arguments):  # noqa: N802 (CUDA's name)
        self.calls.append(("register", *arguments))
        return self.result

    def cudaHostUnregister(self, *arguments):  # noqa: N802
        self.calls.append(("unregister", *arguments))
        return 0


@pytest.fixture
def cuda(monkeypatch):
    def install(result: int) -> FakeRuntime:
        runtime = FakeRuntime(result)
        monkeypatch.setattr(host_slab, "torch", SimpleNamespace(cuda=SimpleNamespace(cudart=lambda: runtime), **TORCH))
        return runtime

    return install


TORCH = {"empty": torch.empty, "frombuffer": torch.frombuffer, "Tensor": torch.Tensor}


def test_memory_is_locked_in_place_and_unlocked_once(cuda):
    runtime = cuda(0)
    slab = HostSlab(4 * BLOCK, ELEMS, torch.float32, page_locked=True)
    slab.close()
    slab.close()
    (register, address, num_bytes, flags), unregister = runtime.calls
    assert (register, num_bytes, flags) == ("register", 4 * BLOCK, 0)
    assert unregister == ("unregister", address)


def test_memory_that_cannot_be_locked_is_used_as_it_is_with_a_warning(cuda, caplog):
    runtime = cuda(2)
    with caplog.at_level(logging.WARNING):
        slab = HostSlab(4 * BLOCK, ELEMS, torch.float32, page_locked=True)
    assert "could not be page-locked (CUDA error 2)" in caplog.text
    assert slab.allocate(2, 2) is not None
    slab.close()
    assert len(runtime.calls) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine can lock memory")
def test_a_machine_without_cuda_warns_instead(caplog):
    slab = HostSlab(4 * BLOCK, ELEMS, torch.float32, page_locked=True)
    assert "could not be page-locked" in caplog.text
    slab.close()
