"""Who answers for the teacher: vLLM in this process, or an HTTP endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Request:
    """One text to be written. `prompt` is a completion prompt, or the messages of a chat."""

    prompt: str | tuple[Message, ...]
    seed: int | None = None  # only where the temperature is above 0
    structure: str | None = None  # a structural tag, the form that the text must have


@dataclass(frozen=True)
class Completion:
    """What became of a request. Token counts are None where they are unknown."""

    text: str
    finish_reason: Literal["stop", "length", "error", "too_long"]
    error: str | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class EngineDied(Exception):
    """The engine failed as a whole, and everything under way with it; only another process can start a sound one."""


class Engine(Protocol):
    """Several threads may call `generate` at once; an engine keeps all their requests under way together."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order; a request that fails gives an error and spoils no other.

        Raises:
            EngineDied: see there.
            UserError: nothing can be generated at all, such as with a wrong key.
        """

    def close(self) -> None: ...
