"""Code that a run's config.json names runs only where this user said yes to it.

Whoever trains names rewards and models: that is the yes. The run then gets a proof of it, `trust.json`: for each piece
of code an HMAC-SHA256 over what names it, with a key of this user's that never leaves the machine. A run that came from
elsewhere has none, and what would run its code asks first.

A boundary module: it looks for the user's state folder in the environment.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.config.loading import COMMAND_LINE, LoadedConfig
from groupwise.config.model_name import MODEL_FILE, read_object
from groupwise.errors import ConfigError
from groupwise.files import write_json_atomic

PROOF_FILE = "trust.json"
_KEY_BYTES = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """One piece of code that a run's config names.

    Attributes:
        setting: where it stands.
        shown: for people.
        content: all that decides what would run, as JSON; of a file also a digest of what is in it now.

    Example:
        Claim("reward.0.name", "reward my.py:short", '{"args": {}, "digest": "9f…", "name": "my.py:short"}')
    """

    setting: str
    shown: str
    content: str

    @classmethod
    def of(cls, setting: str, shown: str, **content: Any) -> Claim:
        return cls(setting, shown, json.dumps(content, sort_keys=True))

    def proof(self, key: bytes) -> str:
        return hmac.new(key, self.content.encode(), hashlib.sha256).hexdigest()


def prove(run: Path) -> None:
    """Write down that this user said yes to the code that the run's config.json names; nothing if it names none.

    Where the user's key cannot be kept there is no proof, which is logged.
    """
    claims = _claims(read_object(run / MODEL_FILE))
    if not claims:
        return
    try:
        key = _user_key()
    except OSError as error:
        logger.warning(
            "the run names code (%s), and there is no proof that you said so: %s; `groupwise eval` and --resume will "
            "ask for --trust-rewards",
            ", ".join(claim.shown for claim in claims),
            error,
        )
        return
    write_json_atomic(run / PROOF_FILE, {"format": 1, "proofs": [claim.proof(key) for claim in claims]})


def require_yes(loaded: LoadedConfig, run: Path, *, rewards_trusted: bool) -> None:
    """Refuse code that the config took from the run's config.json, and that this user has not said yes to.

    Args:
        rewards_trusted: whether --trust-rewards was given.

    Raises:
        ConfigError: names the code, and how to say yes.
    """
    claims = [
        claim
        for claim in _claims(read_object(run / MODEL_FILE))
        if loaded.origins.get(claim.setting, "") != COMMAND_LINE and _asked_for(loaded, claim)
    ]
    rewards = [claim for claim in claims if claim.setting.startswith(("reward.", "environment."))]
    asked = [claim for claim in claims if claim not in rewards or not rewards_trusted]
    unproven = _unproven(asked, run)
    if not unproven:
        return
    ways = [
        *(["--trust-rewards, or the same name with --reward"] if set(rewards) & set(unproven) else []),
        *(["--model.trust_remote_code true"] if set(unproven) - set(rewards) else []),
    ]
    raise ConfigError(
        f"{run / MODEL_FILE} names code that would run here, and nothing shows that you made this run with this code "
        f"on this machine: {', '.join(claim.shown for claim in unproven)}; read it, and if you trust it, give "
        f"{' and '.join(ways)}"
    )


def _asked_for(loaded: LoadedConfig, claim: Claim) -> bool:
    """Whether it would run: rewards that were replaced on the command line are gone."""
    section, _, rest = claim.setting.partition(".")
    if section == "reward":
        return int(rest.partition(".")[0]) < len(loaded.config.reward)
    if section == "environment":
        return True
    return loaded.config.model.trust_remote_code


def _unproven(claims: Sequence[Claim], run: Path) -> list[Claim]:
    proofs = read_object(run / PROOF_FILE).get("proofs")
    there = [proof for proof in proofs if isinstance(proof, str)] if isinstance(proofs, list) else []
    if not claims or not there:
        return list(claims)
    try:
        key = _user_key()
    except OSError:
        return list(claims)
    return [claim for claim in claims if not any(hmac.compare_digest(claim.proof(key), proof) for proof in there)]


def _claims(config: Mapping[str, Any]) -> list[Claim]:
    found: list[Claim] = []
    rewards = config.get("reward")
    for number, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        name = reward.get("name") if isinstance(reward, dict) else None
        if isinstance(name, str) and ":" in name:
            named = {"name": name, "args": reward.get("args"), "digest": _digest(name)}
            found.append(Claim.of(f"reward.{number}.name", f"reward {name}", **named))
    environment = config.get("environment")
    name = environment.get("name") if isinstance(environment, dict) else None
    if isinstance(name, str) and isinstance(environment, dict) and ":" in name:
        named = {"name": name, "args": environment.get("args"), "digest": _digest(name)}
        found.append(Claim.of("environment.name", f"environment {name}", **named))
    model = config.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code"):
        path = str(model.get("path"))
        shown = f"code that comes with the model {path}"
        found.append(Claim.of("model.trust_remote_code", shown, trust_remote_code=path))
    return found


def _digest(reward: str) -> str | None:
    """Of the file that a reward or an environment is in; None for an installed module."""
    with suppress(OSError, ValueError, RuntimeError):
        return hashlib.blake2b(Path(reward.rpartition(":")[0]).expanduser().read_bytes()).hexdigest()
    return None


def _user_key() -> bytes:
    """Made once; whoever is second takes the first one's.

    Raises:
        OSError: there is no place for it, or what is there is no key of this user's alone.
    """
    file = _state_folder() / "key"
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = file.with_name(f".key-{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(secrets.token_bytes(_KEY_BYTES))
                opened.flush()
                os.fsync(opened.fileno())
            with suppress(FileExistsError):
                os.link(temporary, file)
        finally:
            temporary.unlink()
    if file.stat().st_mode & 0o077:
        raise PermissionError(f"{file} can be read by others; remove it, or take their rights away")
    key = file.read_bytes()
    if len(key) < _KEY_BYTES:
        raise PermissionError(f"{file} is no key; remove it")
    return key


def _state_folder() -> Path:
    """XDG's: a relative path in the variable does not count."""
    named = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "groupwise"
    try:
        return Path.home() / ".local" / "state" / "groupwise"
    except RuntimeError as error:
        raise FileNotFoundError(f"no home folder: {error}") from error
