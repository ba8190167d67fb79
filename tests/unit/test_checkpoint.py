from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupwise.checkpoint import find_latest, list_checkpoints, load_checkpoint, read_manifest, save_checkpoint
from groupwise.checkpoint.codec import CodecError, decode_state, encode_state
from groupwise.errors import CheckpointError
from groupwise.protocols import Stateful


class Part:
    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def loaded(path: Path, *names: str) -> dict[str, Any]:
    parts = {name: Part() for name in names}
    load_checkpoint(path, parts)
    return {name: part.state for name, part in parts.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(root: Path, step: int, value: Any = None, *, keep: int = 2) -> Path:
    state = {"value": step if value is None else value, "weights": torch.full((50,), float(step))}
    return save_checkpoint(root, step, {"policy": Part(state)}, keep=keep)


def in_child(action: Callable[[], None]) -> int:
    """Run in a forked process; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            torch.set_num_threads(1)  # the parent's other threads are not there, and would be waited for
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)], ids=str)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]):
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = (raw % 2).bool().reshape(shape) if dtype is torch.bool else raw.view(dtype).reshape(shape)
    path = save_checkpoint(tmp_path, 1, {"p": Part({"t": tensor})}, keep=1)
    back = loaded(path, "p")["p"]["t"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert bits(back) == bits(tensor)


def test_views_shared_and_strided_tensors_come_back_apart(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.randn(3))
    state = {"base": base, "same": base, "row": base[1], "turned": base.T, "step": base[::2, 1::2], "p": parameter,
             "wide": torch.ones(1).expand(4), "conj": torch.tensor([1 + 2j]).conj()}  # fmt: skip
    path = save_checkpoint(tmp_path, 1, {"p": Part(state)}, keep=1)
    back = loaded(path, "p")["p"]
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    assert not back["p"].requires_grad
    back["same"].zero_()
    assert torch.equal(back["base"], base)
    assert (path / "p.safetensors").stat().st_size < 1200, "a view must not store its whole base"


def test_a_state_comes_back_as_it_was_types_included(tmp_path: Path):
    state = {
        "none": None, "yes": True, "one": 1, "big": 2**130, "float": 0.1, "minus zero": -0.0, "inf": -math.inf,
        "text": "größe \n\x00 数学 🙂", "empty": {}, "list": [1, [2.0, (3, "x")], ()], "$tensor": "not a reference",
        "int keys": {0: {"exp_avg": torch.ones(2)}, 1: {}}, "tuple keys": {(1, "a"): None}, "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)}, "": torch.full((1,), 7.0), "nested $": [{"$x": 1}, {"$tuple": [1]}],
    }  # fmt: skip
    back = loaded(save_checkpoint(tmp_path, 1, {"p": Part(state)}, keep=1), "p")["p"]
    tensors = [("a.b",), ("a", "b"), ("",), ("int keys", 0, "exp_avg")]
    for place in tensors:
        was, now = state, back
        for key in place[:-1]:
            was, now = was[key], now[key]
        assert torch.equal(was.pop(place[-1]), now.pop(place[-1])), place
    assert back == state
    assert repr(back) == repr(state), "int and float, tuple and list, 0.0 and -0.0 are told apart"


def test_nan_and_a_real_optimiser(tmp_path: Path):
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.9))
    weight.sum().backward()
    optimiser.step()
    path = save_checkpoint(tmp_path, 1, {"optim": optimiser, "x": Part({"loss": math.nan})}, keep=1)  # pyright: ignore[reportArgumentType]
    again = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    other = Part()
    assert load_checkpoint(path, {"optim": again, "x": other}) == 1  # pyright: ignore[reportArgumentType]
    assert repr(again.state_dict()) == repr(optimiser.state_dict())
    assert math.isnan(other.state["loss"])
    assert "NaN" not in (path / "x.json").read_text()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text() | st.integers() | st.sampled_from(["$tensor", "$dict"]), inner, max_size=3)
        ),
        max_leaves=10,
    )
)
def test_the_codec_loses_nothing(value: Any):
    encoded = encode_state({"v": value}, "p")
    back = decode_state(json.loads(json.dumps(encoded.structure, allow_nan=False)), encoded.tensors)
    assert repr(back) == repr({"v": value})


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (object(), "builtins.object at p.a.1"),
        (np.zeros(2), "numpy.ndarray at p.a.1"),
        (np.int64(3), "numpy.int64 at p.a.1"),
        ({1, 2}, "builtins.set"),
        (b"x", "builtins.bytes"),
        ("\udcff", "not valid Unicode"),
        (torch.ones(2, device="meta"), "holds data"),
        (torch.eye(2).to_sparse(), "dense"),
    ],
)
def test_what_cannot_be_stored_is_named_with_its_place(tmp_path: Path, value: Any, part: str):
    with pytest.raises(CodecError, match=part.replace(".", r"\.")):
        encode_state({"a": [0, value]}, "p")
    with pytest.raises(CheckpointError, match="step_000003"):
        save_checkpoint(tmp_path, 3, {"p": Part({"a": [0, value]})}, keep=1)
    assert not list(tmp_path.iterdir())


def test_a_state_that_contains_itself(tmp_path: Path):
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        save_checkpoint(tmp_path, 1, {"p": Part(state)}, keep=1)


def test_subclasses_come_back_as_plain_built_ins(tmp_path: Path):
    state = {"o": OrderedDict(b=1, a=np.float64(0.1))}
    back = loaded(save_checkpoint(tmp_path, 1, {"p": Part(state)}, keep=1), "p")["p"]
    assert repr(back) == "{'o': {'b': 1, 'a': 0.1}}"


def test_no_pickle_is_written(tmp_path: Path):
    path = save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "policy.json", "policy.safetensors"]


def test_latest_prune_and_listing(tmp_path: Path):
    assert find_latest(tmp_path / "none") is None
    assert find_latest(tmp_path) is None
    for step in (5, 10, 1_000_000, 2_000_000):
        path = save(tmp_path, step, keep=2)
    assert [found.name for found in list_checkpoints(tmp_path)] == ["step_1000000", "step_2000000"]
    assert find_latest(tmp_path) == path
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_1000000", "step_2000000"]
    (tmp_path / "latest").write_text("step_1000000\n")
    assert find_latest(tmp_path) == tmp_path / "step_1000000", "the pointer decides"
    for content in (b"", b"step_000007", b"../../etc", b"\xff", b"."):
        (tmp_path / "latest").write_bytes(content)
        assert find_latest(tmp_path) == path, "a useless pointer is passed over"
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path) == path


def test_going_back_does_not_prune_what_was_just_saved(tmp_path: Path):
    save(tmp_path, 10, keep=1)
    path = save(tmp_path, 4, keep=1)
    assert path.exists()
    assert find_latest(tmp_path) == path
    save(tmp_path, 12, keep=1)
    assert [found.name for found in list_checkpoints(tmp_path)] == ["step_000012"]


def test_saving_over_a_step_replaces_it_and_stale_folders_go(tmp_path: Path):
    save(tmp_path, 3, "old")
    stale = tmp_path / ".tmp-step_000009-1"
    stale.mkdir()
    (stale / "policy.json").write_text("{")
    (tmp_path / "notes.txt").write_text("kept")
    path = save(tmp_path, 3, "new")
    assert loaded(path, "policy")["policy"]["value"] == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "notes.txt", "step_000003"]


@pytest.mark.parametrize("name", ["manifest.json", "policy.json", "policy.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "bit", "longer"])
def test_damage_is_found_and_the_file_and_the_way_out_are_named(tmp_path: Path, name: str, damage: str):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "longer":
        file.write_bytes(content + b"}")
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    part = Part({"untouched": True})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "step_000002", {"policy": part})
    assert "step_000002" in str(caught.value)
    assert "step_000001" in str(caught.value)
    assert "latest" in str(caught.value)
    if not (name == "manifest.json" and damage == "bit"):  # a bit of the manifest may be another file's checksum
        assert name in str(caught.value)
    assert part.state == {"untouched": True}
    (tmp_path / "latest").write_text("step_000001\n")
    found = find_latest(tmp_path)
    assert found is not None
    assert loaded(found, "policy")["policy"]["value"] == 1, "the advice works"


def test_a_damaged_only_checkpoint_says_to_start_again(tmp_path: Path):
    (save(tmp_path, 1) / "policy.json").write_text("{}")
    with pytest.raises(CheckpointError, match="start again"):
        loaded(tmp_path / "step_000001", "policy")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        loaded(tmp_path / "step_000009", "policy")


def test_no_part_changes_unless_all_can(tmp_path: Path):
    path = save_checkpoint(tmp_path, 1, {"a": Part({"x": 1}), "b": Part({"x": 2})}, keep=1)
    assert read_manifest(path).parts == ("a", "b")
    assert loaded(path, "b") == {"b": {"x": 2}}
    a, c = Part("old"), Part("old")
    with pytest.raises(CheckpointError, match="expected also c"):
        load_checkpoint(path, {"a": a, "c": c})
    assert (a.state, c.state) == ("old", "old")


def test_another_format_is_refused(tmp_path: Path):
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(CheckpointError, match="format 3"):
        read_manifest(manifest.parent)


def test_part_names_are_file_names(tmp_path: Path):
    for name in ("../x", "A", "", "manifest"):
        with pytest.raises(AssertionError, match="file name"):
            save_checkpoint(tmp_path, 1, {name: Part({})}, keep=1)
    assert isinstance(Part(), Stateful)


@pytest.mark.parametrize(
    ("name", "call"), [("fsync", call) for call in range(1, 11)] + [("replace", call) for call in range(1, 6)]
)
def test_a_full_disk_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int
):
    save(tmp_path, 1)
    save(tmp_path, 2, "old")
    real, count = getattr(os, name), 0

    def full(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(tmp_path, 2, "new")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".tmp-")]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000002"]
    assert loaded(tmp_path / "step_000001", "policy")["policy"]["value"] == 1
    assert loaded(tmp_path / "step_000002", "policy")["policy"]["value"] in ("old", "new")


def test_a_write_that_the_system_refuses_inside_the_tensor_file(tmp_path: Path):
    save(tmp_path, 1)

    def save_large() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(CheckpointError, match="older checkpoints are untouched"):
            save_checkpoint(tmp_path, 2, {"policy": Part({"w": torch.zeros(1_000_000)})}, keep=1)

    assert in_child(save_large) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert loaded(tmp_path / "step_000001", "policy")["policy"]["value"] == 1


@pytest.mark.parametrize("step", [2, 3], ids=["over an existing step", "a new step"])
def test_killed_at_any_instant_the_old_or_the_new_state_is_there(tmp_path: Path, step: int):
    """The process dies just before each call that changes the disk, one call further each time."""
    deaths = 0
    for call in range(1, 60):
        root = tmp_path / str(call)
        save(root, 1)
        save(root, 2, "old")

        def die_at(root: Path = root, call: int = call) -> None:
            count = 0

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def wrapper(*args: Any, **kwargs: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return wrapper

            for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            save(root, step, "new")

        code = in_child(die_at)
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        found = find_latest(root)
        assert found is not None
        assert loaded(found, "policy")["policy"]["value"] in ("old", "new")
        save(root, 4)
        assert sorted(entry.name for entry in root.iterdir() if entry.name.startswith(".")) == [], "mended by the next"
        assert find_latest(root) == root / "step_000004"
        if code == 0:
            break
    assert deaths >= 8
    assert code == 0, "the last round must have got through"  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize(
    "change",
    [
        {"parts": [["a"]]},
        {"parts": None},
        {"files": {"../../a.json": {"bytes": 1, "blake2b": "x"}}},
        {"files": {"a": 1}},
    ],
)
def test_a_manifest_of_anything_is_refused(tmp_path: Path, change: dict[str, Any]):
    manifest = save(tmp_path, 1) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_checkpoint(manifest.parent, {"policy": Part({})})
