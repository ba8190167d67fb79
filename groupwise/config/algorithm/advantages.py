"""How rewards become advantages; each has its own settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from groupwise.config.base import Variant


class AdvantageSettings(Variant):
    """What an advantage takes, under the names of its function's arguments.

    Attributes:
        no_kl_in_reward: why a KL cannot be taken off its rewards, where it cannot.
        over_batch: its baseline is the whole batch's, so a group of equal rewards teaches as well.
        needs_reward: a rollout without a reward cannot be learned from.
        needs_group: it compares the samples of one prompt, so one alone teaches nothing.
    """

    no_kl_in_reward: ClassVar[str] = ""
    over_batch: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = True
    needs_group: ClassVar[bool] = True


class Grpo(AdvantageSettings):
    name: Literal["grpo"] = Field(
        default="grpo", description="how rewards become advantages; not given: the algorithm's own"
    )
    scale: Literal["group", "batch", "none"] = Field(
        default="group", description="divide by the std of the group, of the batch, or not at all"
    )


class Rloo(AdvantageSettings):
    name: Literal["rloo"] = "rloo"


class ReinforcePp(AdvantageSettings):
    name: Literal["reinforce_pp"] = "reinforce_pp"
    over_batch: ClassVar[bool] = True
    needs_group: ClassVar[bool] = False


class ReinforcePpBaseline(AdvantageSettings):
    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class Opo(AdvantageSettings):
    name: Literal["opo"] = "opo"


class MaxRl(AdvantageSettings):
    name: Literal["maxrl"] = "maxrl"


class PassK(AdvantageSettings):
    name: Literal["pass_k"] = "pass_k"
    k: int = Field(default=4, ge=1, description="below group_size, or all advantages are 0")
    threshold: float = Field(default=0.0, description="a reward above this is a right answer")
    no_kl_in_reward: ClassVar[str] = "only asks whether an answer is right, and a KL must not decide that"


class Gdpo(AdvantageSettings):
    name: Literal["gdpo"] = "gdpo"
    no_kl_in_reward: ClassVar[str] = "compares each reward function's own values, and not their sum"


class NoOutcome(AdvantageSettings):
    name: Literal["none"] = "none"
    no_kl_in_reward: ClassVar[str] = "has no use for rewards"
    needs_reward: ClassVar[bool] = False
    needs_group: ClassVar[bool] = False


Advantage: TypeAlias = Annotated[
    Grpo | Rloo | ReinforcePp | ReinforcePpBaseline | Opo | MaxRl | PassK | Gdpo | NoOutcome,
    Field(discriminator="name"),
]
