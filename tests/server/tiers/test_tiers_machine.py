"""The tiers under anything in any order."""

from __future__ import annotations

from types import ModuleType

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


def test_whatever_happens_everything_ends_and_nothing_is_served_under_another_identity(machine: ModuleType) -> None:
    run_state_machine_as_test(
        machine.TiersMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
