"""What `groupwise quickstart` runs: sizes, counts and the two configs, chosen so that all of it fits in four minutes.

The warm-up learns format, procedure and sums from demonstrations that often add where they should take away (see
`groupwise.quickstart.task`); GRPO then learns from the reward alone which of the two is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from groupwise.config import Config
from groupwise.quickstart.task import TaskFiles, make_task
from groupwise.quickstart.tiny_model import build_tiny_model, check_new_folder, strings_in

SIZE = "0.6m"
# The task's texts fill this vocabulary, so the model has no token that the tokenizer lacks.
VOCAB_SIZE = 400

SFT_STEPS = 320
SFT_ROWS_PER_STEP = 32
NUM_SFT = 4000

GRPO_STEPS = 50
PROMPTS_PER_STEP = 32
NUM_TRAIN = GRPO_STEPS * PROMPTS_PER_STEP
EVAL_EVERY = 10

# A right solution has at most 21 tokens; the rest leaves room for a model that does not stop in time.
MAX_COMPLETION_TOKENS = 32


@dataclass(frozen=True, slots=True)
class QuickstartFolders:
    """Where the parts of one quickstart lie.

    Example:
        QuickstartFolders(Path("runs/quickstart")).grpo == Path("runs/quickstart/grpo")
    """

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def model(self) -> Path:
        """The fresh model."""
        return self.root / "model"

    @property
    def sft(self) -> Path:
        """Run directory of the warm-up."""
        return self.root / "sft"

    @property
    def grpo(self) -> Path:
        """Run directory of GRPO; its `final/` is the result."""
        return self.root / "grpo"


@dataclass(frozen=True, slots=True)
class QuickstartRecipe:
    """The two runs, in order; the second starts from the first one's `final/`.

    Example:
        recipe = quickstart_recipe("runs/quickstart", seed=0)
        recipe.grpo.algorithm.name == "grpo"
    """

    folders: QuickstartFolders
    task: TaskFiles
    sft: Config
    grpo: Config


def prepare(root: str | Path, *, seed: int = 0) -> QuickstartRecipe:
    """Write the task and the fresh model under `root`; returns the recipe to run on them.

    Raises:
        ConfigError: `root` already has a model folder that holds something; nothing is written then.
    """
    recipe = quickstart_recipe(root, seed=seed)
    check_new_folder(recipe.folders.model)
    task = make_task(recipe.folders.data, seed=seed, num_sft=NUM_SFT, num_train=NUM_TRAIN)
    assert task == recipe.task, "the recipe's files are not those that the task wrote"
    build_tiny_model(recipe.folders.model, texts=_texts(task), size=SIZE, vocab_size=VOCAB_SIZE, seed=seed)
    return recipe


def quickstart_recipe(root: str | Path, *, seed: int = 0) -> QuickstartRecipe:
    """Both configs, resolved for the folders under `root`; writes nothing."""
    folders = QuickstartFolders(Path(root))
    task = TaskFiles.under(folders.data)
    sft = {
        "model": {"path": str(folders.model), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(task.sft), "max_prompt_tokens": 128},
        "sft": {"rows_per_step": SFT_ROWS_PER_STEP, "max_tokens": 128},
        "optim": {
            "lr": 3e-3,
            # AdamW's usual 0.999 remembers a thousand steps, more than these runs have.
            "betas": (0.9, 0.98),
            "schedule": "cosine",
            "warmup_ratio": 0.07,
            "min_lr_ratio": 0.1,
        },
        "train": {"output": str(folders.sft), "steps": SFT_STEPS, "seed": seed},
    }
    grpo = {
        "model": {"path": str(folders.sft / "final"), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(task.train), "eval": str(task.test), "max_prompt_tokens": 128},
        "reward": [{"name": "gsm8k"}],
        "rollout": {
            "group_size": 8,
            "prompts_per_step": PROMPTS_PER_STEP,
            "max_completion_tokens": MAX_COMPLETION_TOKENS,
        },
        "algorithm": {"name": "grpo"},
        "optim": {"lr": 2e-4, "betas": (0.9, 0.98), "warmup_ratio": 0.08},
        "train": {"output": str(folders.grpo), "steps": GRPO_STEPS, "seed": seed},
        "eval": {"every": EVAL_EVERY},
    }
    return QuickstartRecipe(folders, task, sft=Config.model_validate(sft), grpo=Config.model_validate(grpo))


def _texts(task: TaskFiles) -> list[str]:
    from groupwise.data.files import read_rows

    roles = ["system", "user", "assistant"]
    rows = [row.values for row in read_rows(task.sft)]
    return [text for row in rows for text in [*strings_in([row["prompt"], row["extra_info"]["answer"]]), *roles]]
