"""What logs and traces tell of a generation: who asked for what, and what became of it. Never its texts."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.generation import Generation
from loraplex.server.span_times import AdapterUse


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRecord:
    """A generation under way, or over.

    Attributes:
        operation: ``chat`` or ``text_completion``.
        model: that the client asked for.
        base_name: of the base model.
        answer_id: of the answer's body.
        adapters, weights: that it runs under.
        stream: whether the answer is streamed.
    """

    operation: str
    model: str
    base_name: str
    answer_id: str
    adapters: list[str]
    weights: list[float]
    stream: bool
    generation: Generation

    @property
    def uses(self) -> list[AdapterUse]:
        """The adapters as the engine has found them; empty before the first output."""
        told = (prompt.began for prompt in self.generation.timing.prompts.values())
        return next((began.adapters for began in told if began is not None), [])
