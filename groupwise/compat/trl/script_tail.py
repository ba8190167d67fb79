"""What scripts call when training is done: numbers, state, model card and the Hub, as TRL's trainers have them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from groupwise.compat.keeping import CARD, Place
from groupwise.compat.trl.accelerator import Accelerator
from groupwise.compat.trl.guard import Guarded
from groupwise.errors import ConfigError
from groupwise.export.push import check_repo, plan_push, push, require_token
from groupwise.files import json_safe, write_json_atomic, write_text_atomic

RESULTS = tuple(f"{split}_results.json" for split in ("train", "eval", "test", "predict", "all"))
STATE = "trainer_state.json"


class ScriptTail(Guarded):
    """The part of a trainer that is used after training; see `Trainer`."""

    args: Any
    state: TrainerState
    _output_place: Place
    _name: str = ""
    _tag_names: tuple[str, ...] | list[str] = ()

    @property
    def model(self) -> Any:
        raise NotImplementedError

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        raise NotImplementedError

    @property
    def accelerator(self) -> Accelerator:
        """One process on one device."""
        return Accelerator(self.model.device)

    def is_world_process_zero(self) -> bool:
        return True

    def is_local_process_zero(self) -> bool:
        return True

    def get_num_trainable_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def get_learning_rates(self) -> list[float]:
        """The last one that was logged; of one group."""
        rates = [row["learning_rate"] for row in self.state.log_history if "learning_rate" in row]
        return rates[-1:]

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers as people read them: four decimals, and times as hours, minutes and seconds."""
        shown: dict[str, Any] = {}
        for name, value in metrics.items():
            if "_runtime" in name:
                shown[name] = f"{timedelta(seconds=int(value))}.{int(value % 1 * 100):02d}"
            elif name == "total_flos":
                shown[name] = f"{int(value) >> 30}GF"
            else:
                shown[name] = round(value, 4) if isinstance(value, float) else value
        return shown

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print them, one a line."""
        shown = {name: str(value) for name, value in sorted(self.metrics_format(metrics).items())}
        wide, wider = (max(map(len, texts), default=0) for texts in (shown, shown.values()))
        lines = [f"***** {split} metrics *****", *(f"  {n:<{wide}} = {value:>{wider}}" for n, value in shown.items())]
        sys.stdout.write("\n".join(lines) + "\n")

    def save_metrics(self, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
        """Write `<split>_results.json` into output_dir, and with `combined` add them to all_results.json."""
        self._write(f"{split}_results.json", dict(sorted(metrics.items())))
        if combined:
            file = self._output_place.folder / "all_results.json"
            before = json.loads(file.read_bytes()) if file.is_file() else {}
            self._output_place.wrote([file.name])  # nothing in it is lost: it grows
            self._write(file.name, dict(sorted({**before, **metrics}.items())))

    def save_state(self) -> None:
        """Write trainer_state.json into output_dir."""
        self._write(STATE, state_dict(self.state))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md into output_dir: what was trained, from what, with which settings."""
        base = str(getattr(self.model.config, "_name_or_path", "") or "")  # of any class of transformers'
        more = [tags] if isinstance(tags, str) else list(tags or ())
        every = list(dict.fromkeys([*self._tag_names, *more]))
        name = model_name or Path(self.args.output_dir).resolve().name
        head = {"base_model": base, "library_name": "transformers", "model_name": name, "tags": every}
        if dataset_name:
            head["datasets"] = dataset_name
        front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items() if value)
        last = {key: value for row in self.state.log_history for key, value in row.items() if key != "step"}
        numbers = "".join(
            f"| `{key}` | {last[key]} |\n" for key in ("reward", "loss", "train_loss", "epoch") if key in last
        )
        text = (
            f"---\n{front}---\n\n# {name}\n\n{base or 'A model'}, trained by {self._name} of "
            f"Groupwise for {self.state.global_step} steps.\n\n"
            f"| last logged | |\n|---|---|\n{numbers}\n```text\n{self.args!r}\n```\n"
        )
        folder = self._output_place.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._output_place.free([CARD])
        write_text_atomic(folder / CARD, text)
        self._output_place.wrote([CARD])

    def init_hf_repo(self, token: str | None = None) -> None:
        """Check that the Hub can be written to: a name `owner/name` in hub_model_id, and a token.

        Raises:
            ConfigError: one of them is missing.
        """
        self._hub_name()
        require_token(token or self.args.hub_token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> str:
        """Save the model into output_dir, write its card, and send both to `hub_model_id`; the commit's address.

        Args:
            options: `private`; others are the card's: `model_name`, `dataset_name`, `tags`.

        Raises:
            ConfigError: hub_model_id is no `owner/name`, there is no token, or `blocking` or `revision` is given. The
                model is saved by then.
            ExportError: the Hub refused, or could not be reached.
        """
        if not blocking or revision is not None:
            raise ConfigError(
                "push_to_hub: it waits for one commit to the main branch; leave blocking and revision out"
            )
        private = options.pop("private", None)
        self.save_model(_internal_call=True)
        self.create_model_card(**options)
        repo, token = self._hub_name(), require_token(token or self.args.hub_token)
        private = self.args.hub_private_repo if private is None else private
        place = plan_push(self._output_place.folder, repo, private=bool(private), only=self._output_place.own)
        return push(place, message=commit_message or "End of training", token=token)

    def _hub_name(self) -> str:
        name = self.args.hub_model_id
        if not name:
            raise ConfigError(f"{type(self.args).__name__}.hub_model_id: got none; expected 'owner/name'")
        check_repo(name)
        return name

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        place = self._output_place
        place.folder.mkdir(parents=True, exist_ok=True)
        place.free([name])
        write_json_atomic(place.folder / name, content)
        place.wrote([name])


def state_dict(state: TrainerState) -> dict[str, Any]:
    """What `TrainerState.load_from_json` reads."""
    return json_safe(asdict(state))
