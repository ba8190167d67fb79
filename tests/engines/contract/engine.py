"""What is behind every contract server: requests that take a token in turn, paused, aborted, and cached by prefix.

A request's tokens depend on weights, prompt, sampling and seed, never on its company, because each has a forward of
its own. The engines' own words for all this are in the server's modules.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.engines.contract.model import Loaded, ServedModel
from tests.engines.contract.traps import Traps

BLOCK = 16
"""Tokens that the prefix cache takes together."""
MOST_PREFIXES = 256

LogprobKind = Literal["processed", "temperature", "raw"]
"""Of what is drawn from; of logits / temperature before truncation; of the logits."""


class Busy(Exception):
    """The engine is paused, and takes nothing now."""


class Dead(Exception):
    """The engine's worker has ended."""


@dataclass(frozen=True)
class Draw:
    """How one answer is drawn. `top_k` of 0 keeps all; a seed of None draws differently each time."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    eos: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    banned: frozenset[int] = frozenset()
    stop_texts: tuple[str, ...] = ()
    kind: LogprobKind = "processed"
    nan_ends: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5 or self.top_k == 1


@dataclass
class Answer:
    """Tokens with their log-probs `[T]`, in the engine's words nowhere yet.

    Attributes:
        finish: `nan` where logits that are no numbers end an answer.
        stopped_by: the token or text, if it was not the end of sequence.
        spans: version, start and end, over the tokens.
        cached: tokens of the prompt that were not computed.
        kept: the tokens that each one was drawn from.
        drawn_logprobs: log-probs over these, whatever `logprobs` are of.
        routes: `[prompt + T - 1][layers][k]`, the experts of each token that was run; none of a dense model.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    finish: Literal["stop", "length", "abort", "nan"] = "length"
    stopped_by: int | str | None = None
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    cached: int = 0
    kept: list[list[int]] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    routes: list[Any] = field(default_factory=list)

    def add(self, token: int, logprob: float, rank: int, version: str) -> None:
        at = len(self.token_ids)
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self.ranks.append(rank)
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1], at + 1)
        else:
            self.spans.append((version, at, at + 1))


@dataclass(eq=False)
class Running:
    """A request that the engine holds."""

    rid: str
    prompt: list[int]
    draw: Draw
    adapter: str | None
    cache: DynamicCache | None = None
    aborted: bool = False


class Engine:
    """The engine of one server.

    Args:
        context: the longest sequence, prompt and answer together.
        caches: whether blocks of prompts are kept for later requests.
    """

    def __init__(self, model: ServedModel, traps: Traps, *, context: int = 512, caches: bool = True) -> None:
        self.model, self.traps = model, traps
        self._context, self._caches = context, caches
        self.version = "default"
        self.paused: str | None = None
        self.asleep: set[str] = set()
        self.dead = False
        self.tells_routes = False
        self._told: list[Any] = []
        self._running: list[Running] = []
        self._blocks: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = {}

    @property
    def context(self) -> int:
        return int(self.traps.number("short_context", 24)) if "short_context" in self.traps else self._context

    @property
    def running(self) -> list[str]:
        return [each.rid for each in self._running]

    # Requests

    async def answer(
        self, rid: str, prompt: list[int], draw: Draw, *, adapter: str | None = None, salt: str | None = None
    ) -> Answer:
        """Draw one answer; waits while the engine is paused.

        Raises:
            Busy: paused, and the server does not let requests wait.
            Dead: the worker ended.
        """
        if self.paused and "paused_503" in self.traps:
            raise Busy
        request = Running(rid, prompt, draw, adapter)
        self._running.append(request)
        try:
            answer = await self._drawn(request, salt)
            if self.tells_routes:
                answer.routes = self._routes(request, answer)
            return self._spoiled(answer)
        finally:
            self._running.remove(request)

    async def _drawn(self, request: Running, salt: str | None) -> Answer:
        answer, draw = Answer(), request.draw
        generator = None if draw.seed is None else torch.Generator().manual_seed(draw.seed % 2**63)
        most = min(draw.max_tokens, self.context - len(request.prompt))
        while len(answer.token_ids) < most:
            await self._turn(request)
            if request.aborted:
                answer.finish = "abort"
                return answer
            logits = self._logits(request, answer, salt)
            if "nan" in self.traps and len(answer.token_ids) + 1 == self.traps.number("nan", 2):
                answer.add(0, math.nan, 0, self.version)
                if draw.nan_ends:
                    answer.finish = "nan"
                    return answer
                continue
            token, logprob, rank = drawn(logits, draw, generator)
            answer.add(token, logprob, rank, self.version)
            self._tell_left(answer, logits, draw)
            if self._stops(answer, draw):
                return answer
        return answer

    async def _turn(self, request: Running) -> None:
        """Let others have theirs; wait while nothing may run."""
        await asyncio.sleep(self.traps.number("slow", 0.02) if "slow" in self.traps else 0)
        while (self.paused or self.asleep) and not request.aborted and not self.dead:
            await asyncio.sleep(0.002)
        if self.dead:
            raise Dead

    def _logits(self, request: Running, answer: Answer, salt: str | None) -> Tensor:
        ids = request.prompt + answer.token_ids
        if request.cache is None:
            key = (salt, request.adapter)
            request.cache = self._cached(request.prompt, key)
            answer.cached = answer.cached or request.cache.get_seq_length()
            logits = self.model.next_logits(ids, request.cache, request.adapter)
            self._keep(request.prompt, key, request.cache)
            return logits
        return self.model.next_logits(ids, request.cache, request.adapter)

    def _tell_left(self, answer: Answer, logits: Tensor, draw: Draw) -> None:
        """Which tokens the newest one was drawn from, and its log-prob among them."""
        token = answer.token_ids[-1]
        kept = truncated(logits if draw.greedy else logits / draw.temperature, draw)
        answer.drawn_logprobs.append(min(0.0, float(torch.log_softmax(kept, -1)[token])))
        left = (kept > -math.inf).nonzero().flatten().tolist()
        if "lost_mask" in self.traps and len(answer.token_ids) == 2:
            left = [each for each in left if each != token] or [(token + 1) % self.model.vocab_size]
        answer.kept.append(left)

    def _routes(self, request: Running, answer: Answer) -> list[Any]:
        """Chosen experts of all tokens that were run, as this server would tell them."""
        ids = request.prompt + answer.token_ids
        found = self.model.routes(ids[:-1], request.adapter) if len(ids) > 1 else []
        told = found
        if found and "zero_routes" in self.traps:
            told = [[[0] * len(row) for row in layers] for layers in found]
        if found and "stale_routes" in self.traps and self._told:
            before = self._told[: len(found)]
            told = before + found[len(before) :]
        self._told = found
        return told[:-1] if "wrong_rows" in self.traps else told

    def _stops(self, answer: Answer, draw: Draw) -> bool:
        token = answer.token_ids[-1]
        if token in draw.eos:
            answer.finish = "stop"
        elif token in draw.stop_ids:
            answer.finish, answer.stopped_by = "stop", token
        elif draw.stop_texts:
            text = self.text(answer.token_ids)
            if found := next((stop for stop in draw.stop_texts if stop in text), None):
                answer.finish, answer.stopped_by = "stop", found
        return answer.finish == "stop"

    def _spoiled(self, answer: Answer) -> Answer:
        if "wrong_vocabulary" in self.traps and len(answer.token_ids) > 1:
            answer.token_ids[1] = self.model.vocab_size + 7
        if "impossible_logprob" in self.traps and len(answer.logprobs) > 1:
            answer.logprobs[1] = -9999.0
        if "other_length" in self.traps:
            answer.logprobs = answer.logprobs[:-1]
        return answer

    def text(self, ids: list[int], *, special: bool = True) -> str:
        """Empty without a tokenizer."""
        known = [each for each in ids if each < self.model.vocab_size]
        tokenizer = self.model.tokenizer
        return str(tokenizer.decode(known, skip_special_tokens=not special)) if tokenizer else ""

    def abort(self, wanted: Callable[[str], bool]) -> int:
        """End the requests that are wanted, and tell how many."""
        if "lost_abort" in self.traps:
            return 0
        found = [each for each in self._running if wanted(each.rid)]
        for each in found:
            each.aborted = True
        return len(found)

    async def idle(self) -> None:
        """Until nothing runs any more."""
        while self._running:
            await asyncio.sleep(0.002)

    def die(self) -> None:
        """End the worker; what runs is answered with an error."""
        self.dead = True

    # Weights and caches

    def flush(self, *, running: bool = False) -> bool:
        """Forget all prefixes; false where this is refused. With `running`, what runs is computed again as well."""
        if self.traps.once("flush_refused", math.inf) or (self._running and not running):
            return False
        self._blocks.clear()
        for each in self._running:
            each.cache = None
        return True

    def set_version(self, version: str) -> None:
        if "stale_version" not in self.traps:
            self.version = version

    def load(self, folder: str, *, version: int | None = None) -> Loaded:
        return self.model.load_folder(folder, version=version)

    def _cached(self, prompt: list[int], key: tuple[object, ...]) -> DynamicCache:
        """A cache that holds the longest kept prefix of the prompt, which leaves one token at least."""
        cache = DynamicCache()
        for length in range((len(prompt) - 1) // BLOCK * BLOCK, 0, -BLOCK):
            if (kept := self._blocks.get((*key, *prompt[:length]))) is not None:
                for layer, (keys, values) in enumerate(kept):
                    cache.update(keys.clone(), values.clone(), layer)
                break
        return cache

    def _keep(self, prompt: list[int], key: tuple[object, ...], cache: DynamicCache) -> None:
        if not self._caches:
            return
        for length in range(BLOCK, len(prompt) + 1, BLOCK):
            self._blocks[(*key, *prompt[:length])] = [
                (layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone())  # type: ignore[union-attr]
                for layer in cache.layers
            ]
        for oldest in list(self._blocks)[: max(0, len(self._blocks) - MOST_PREFIXES)]:
            del self._blocks[oldest]


def drawn(logits: Tensor, draw: Draw, generator: torch.Generator | None) -> tuple[int, float, int]:
    """A token, its log-prob and its rank among `logits`, `[V]`."""
    warm = logits if draw.greedy else logits / draw.temperature
    kept = truncated(warm, replace(draw, top_p=1.0, top_k=0, min_p=0.0) if draw.greedy else draw)
    if draw.greedy:
        token = int(kept.argmax())
    else:
        noise = torch.empty_like(kept).exponential_(generator=generator)
        token = int((torch.softmax(kept, -1) / noise).argmax())
    reported = {"processed": kept, "temperature": warm, "raw": logits}[draw.kind]
    logprob = float(torch.log_softmax(reported, -1)[token])
    return token, min(0.0, logprob), int((reported > reported[token]).sum()) + 1


def truncated(logits: Tensor, draw: Draw) -> Tensor:
    """`logits`, `[V]`, with -inf where a token is banned, or min_p, top_k or top_p leave it out, in this order."""
    kept = logits.clone()
    kept[list(draw.banned)] = -math.inf
    if draw.min_p > 0:
        probs = torch.softmax(kept, -1)
        kept[probs < draw.min_p * probs.max()] = -math.inf
    if 0 < draw.top_k < kept.numel():
        kept[kept < kept.topk(draw.top_k).values[-1]] = -math.inf
    if draw.top_p < 1:
        ordered, order = torch.softmax(kept, -1).sort(descending=True)
        before = ordered.cumsum(0) - ordered
        kept[order[before >= draw.top_p]] = -math.inf
    return kept
