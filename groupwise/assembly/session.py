"""A model to be asked, without training: for `eval`, `generate`, `chat`, and what the doors generate and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import cast

from groupwise.config import Config
from groupwise.config.limits import check_lengths, check_stop_tokens
from groupwise.data import check_template, encode_rendered, encode_text, load_prompts, render
from groupwise.data.files import Source
from groupwise.data.prompts import PromptSet
from groupwise.engines import check_engine, refuse_launch
from groupwise.engines.native import NativeEngine
from groupwise.environments import Environments, load_environments
from groupwise.errors import ConfigError, EngineError
from groupwise.evaluation import EvalReport, evaluate
from groupwise.inputs import ModelInput, SampleKey
from groupwise.model.limits import check_evaluation, check_run, find_limits
from groupwise.model.loading import LoadedModel, load_model, load_tokenizer, named_stop_tokens
from groupwise.protocols import Engine, Tokenizer
from groupwise.rewards import RewardScorer
from groupwise.rollout.episode import Sample, run_group, sampled_by
from groupwise.rollout.sampling import eval_sampling, training_sampling
from groupwise.texts import encodable
from groupwise.types import Completion, Message, Prompt, RolloutGroup, SampleRequest, SamplingParams


class Session:
    """Model, tokenizer, engine, environments and limits of one config. Weights are loaded when `engine` is first asked
    for, so that everything else can be refused before.

    Args:
        loaded: a model in memory, instead of `model.path`.

    Raises:
        ConfigError: the model has no folder, or the config names an engine that cannot be asked.

    Example:
        session = Session(config)
        [completion] = asyncio.run(session.complete(session.chat_prompt([{"role": "user", "content": "2+2?"}])))
    """

    def __init__(self, config: Config, loaded: LoadedModel | None = None) -> None:
        check_engine(config.rollout, trains=False)
        refuse_launch(config.rollout)
        self.config = config
        self._given = loaded
        self.tokenizer = cast("Tokenizer", load_tokenizer(config.model)) if loaded is None else loaded.tokenizer
        self.limits = find_limits(loaded, config.model)
        check_stop_tokens(config.rollout.stop_token_ids, self.limits, setting="rollout.stop_token_ids")

    @cached_property
    def engine(self) -> Engine:
        rollout = self.config.rollout
        if rollout.engine != "native":
            return self._elsewhere()
        loaded = self._given or load_model(self.config.model, tokenizer=self.tokenizer)
        return NativeEngine(loaded, rollout)

    def _elsewhere(self) -> Engine:
        """Servers, with whatever weights they have."""
        from groupwise.engines.external import Speaks, external_engine, reach

        rollout = self.config.rollout
        reach(rollout, trains=False)
        return external_engine(
            rollout,
            Speaks(named_stop_tokens(self.config.model, self.tokenizer)),
            decode=partial(self.tokenizer.decode, skip_special_tokens=True),
            encode=partial(self.tokenizer.encode, add_special_tokens=False),
            vocabulary=len(self.tokenizer.get_vocab()) if self.limits.vocabulary is None else self.limits.vocabulary,
        )

    @cached_property
    def sample(self) -> Sample:
        return sampled_by(self.engine)

    @cached_property
    def environments(self) -> Environments:
        kwargs = self.config.data.chat_template_kwargs
        return load_environments(self.config.environment, self.tokenizer, template_kwargs=kwargs)

    def load(self) -> None:
        """Load the weights now, before somebody waits for an answer."""
        _ = self.engine

    def prompts(self, source: Source, scorer: RewardScorer, *, evaluated: bool) -> PromptSet:
        """The rows as prompts that the model has room for and the rewards can score.

        Args:
            evaluated: the first `eval.limit` of them, as an evaluation draws; else all, as training does.

        Raises:
            ConfigError, DataError: a row, a reward or a limit is wrong.
        """
        found = load_prompts(
            source, self.config.data, self.tokenizer, limit=self.config.eval.limit if evaluated else None
        )
        scorer.check_prompts(found.prompts)
        if evaluated:
            check_evaluation(found.prompts, self.limits, self.config)
        else:
            check_run(self.config, self.limits, prompts=found.prompts, eval_prompts=())
        return found

    async def evaluate(self, prompts: Sequence[Prompt], scorer: RewardScorer) -> EvalReport:
        """As `eval` says; errors as of `groupwise.evaluation.evaluate`."""
        return await evaluate(
            self.sample,
            prompts,
            scorer,
            self.environments,
            config=self.config.eval,
            sampling=eval_sampling(self.config),
            version=0,
        )

    async def groups(self, prompts: Sequence[Prompt], scorer: RewardScorer) -> list[RolloutGroup]:
        """`rollout.group_size` episodes of each prompt, scored; as training draws them first."""
        indices = range(self.config.rollout.group_size)
        return [
            await run_group(
                self.sample,
                scorer,
                self.environments,
                prompt,
                keys=[SampleKey(prompt.uid, 0, i) for i in indices],
                sampling=training_sampling(self.config),
                index=index,
            )
            for index, prompt in enumerate(prompts)
        ]

    async def complete(
        self, prompt: Prompt, *, sampling: SamplingParams | None = None, count: int = 1
    ) -> list[Completion]:
        """`count` completions of one turn, by index.

        Raises:
            EngineError: the engine failed on one of them.
        """
        drawn = training_sampling(self.config) if sampling is None else sampling
        requests = [SampleRequest.of(prompt, index, drawn) for index in range(count)]
        replies = [completion async for completion in self.engine.generate(requests)]
        for reply in replies:
            if reply.finish_reason == "error":
                raise EngineError(f"sample {reply.sample_index + 1} failed: {reply.error}")
        return sorted(replies, key=lambda reply: reply.sample_index)

    def within(self, prompt: Prompt, sampling: SamplingParams) -> SamplingParams:
        """The sampling, with no more tokens than the model has positions for after this prompt.

        Raises:
            ConfigError: there are none, or the prompt has tokens that the model does not know.
        """
        check_lengths([prompt.token_ids], self.limits, most=1, setting="--max-tokens", prompts="prompts")
        positions = self.limits.positions
        if positions is None:
            return sampling
        return replace(sampling, max_tokens=min(sampling.max_tokens, positions - len(prompt.token_ids)))

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """The conversation, rendered with the model's chat template.

        Raises:
            ConfigError: the model has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{self.config.model.path} has no chat template; give one with --model.chat_template FILE, "
                "or continue plain text with `groupwise generate --raw`"
            )
        kwargs = self.config.data.chat_template_kwargs
        check_template(self.tokenizer, kwargs)
        text = render(messages, self.tokenizer, template_kwargs=kwargs)
        token_ids = encode_rendered(text, self.tokenizer)
        if not token_ids:
            raise ConfigError("the chat template makes nothing of the message; set model.chat_template to another")
        return Prompt(uid="prompt", messages=tuple(messages), text=text, input=ModelInput.of(token_ids))

    def raw_prompt(self, text: str) -> Prompt:
        """The text as it is, with the tokenizer's own beginning.

        Raises:
            ConfigError: no tokens come of it.
        """
        if encodable(text) != text:
            raise ConfigError("the prompt holds half a surrogate pair or bytes that are no UTF-8; give text")
        token_ids = encode_text(text, self.tokenizer)
        if not token_ids:
            raise ConfigError("the tokenizer makes no tokens of the prompt; give another text")
        return Prompt(uid="prompt", messages=(), text=text, input=ModelInput.of(token_ids))
