"""What an engine does wrong, by name; each can be switched on and off while the server runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

TRAPS: dict[str, str] = {
    # The process
    "dies": "VALUE=n: the process ends at the n-th request for tokens from now (default 1), without an answer",
    "hangs": "every request waits until the trap is taken away; /health is 200, but of SGLang, where it draws",
    "control_hangs": "a control call never returns and does nothing; VALUE: only calls whose path contains it",
    "slow": "VALUE=seconds: every token takes so long (default 0.02)",
    # Weights
    "half_load": "half of the tensors are loaded, then 500; health stays 200",
    "no_effect": "loading answers success and changes nothing",
    "stale_head": "a tied output head keeps its packed copy of the old embeddings",
    "missing_tensor": "one tensor is not loaded (VALUE: its name; default: the largest one inside the last layer)",
    "unbound_adapter": "an adapter is loaded, listed and named, and acts on nothing",
    "stale_decode": "prompts are scored with the new weights, tokens are drawn with the old ones",
    "flush_refused": "VALUE=n: the prefix cache stays, and the answer says so, n times (default: always)",
    "stale_version": "the label of the version stays what it was, whatever the answer says",
    # Requests
    "lost_abort": "an abort is answered with success and ends nothing",
    "duplicated": "an answer that was given before is given again, to another request",
    "short_context": "VALUE=tokens: the longest sequence (default 24); what it cuts off is reported as `length`",
    "wrong_vocabulary": "the second token of each answer has an id beyond the vocabulary",
    "nan": "VALUE=n: the n-th token's logits are NaN (default 2), reported as the engine reports it",
    "impossible_logprob": "the second log-prob of each answer is -9999.0",
    "other_length": "one log-prob fewer than tokens",
    "zero_routes": "chosen experts are all 0, in the right shape, as where a kernel is not asked",
    "wrong_rows": "one token fewer has chosen experts",
    "stale_routes": "chosen experts are those of the answer before, as far as it goes",
    "lost_mask": "the set of tokens that filters left lacks the one that was drawn, at the second token",
    "no_sides": "nothing is told beside tokens, whatever is asked",
    "paused_503": "a paused server answers 503 at once, where it would let requests wait",
}


class Traps:
    """Those that are on, with their values.

    Example:
        traps = Traps(["half_load", "dies=3"])
        traps.number("dies", 1)  # 3
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        self._on: dict[str, str] = {}
        self.set(dict(_parts(each) for each in named))

    def set(self, named: Mapping[str, str | int | float | None]) -> None:
        """Exactly these are on from now.

        Raises:
            ValueError: there is no trap of that name.
        """
        if unknown := sorted(set(named) - set(TRAPS)):
            raise ValueError(f"no trap is called {', '.join(unknown)}; there are {', '.join(TRAPS)}")
        self._on = {name: "" if value is None else str(value) for name, value in named.items()}

    @property
    def on(self) -> dict[str, str]:
        return dict(self._on)

    def __contains__(self, name: str) -> bool:
        assert name in TRAPS, name
        return name in self._on

    def text(self, name: str) -> str:
        """The trap's value; empty where it has none, or is off."""
        return self._on.get(name, "")

    def number(self, name: str, default: float) -> float:
        return float(self.text(name) or default)

    def once(self, name: str, default: float) -> bool:
        """Whether the trap acts this time; each time uses one of as many as its value says."""
        if name not in self:
            return False
        left = self.number(name, default)
        self._on[name] = str(left - 1)
        return left > 0


def _parts(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value
