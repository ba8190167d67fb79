"""No field of XTuner's classes is forgotten, in the code or in docs/migrate.md; and nothing needs the doors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import groupwise.compat.xtuner as door
from groupwise.compat.xtuner import names as classes
from groupwise.compat.xtuner import trainer as trainers
from groupwise.compat.xtuner.base import Apart, Becomes, Mark, Names, Only
from groupwise.compat.xtuner.presets import ModelPreset
from groupwise.config.keys import annotation_of

ROOT = Path(__file__).parents[3]


def all_classes() -> list[type[Names]]:
    modules = (classes, trainers)
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return sorted(
        {one for one in found if issubclass(one, Names) and one is not Names and not issubclass(one, ModelPreset)},
        key=lambda one: one.__name__,
    )


def test_every_field_has_a_mark_or_holds_others() -> None:
    assert len(all_classes()) > 25
    for one in all_classes():
        for name, mark in one.marks().items():
            annotation = str(one.model_fields[name].annotation)
            assert mark is not None or "groupwise.compat.xtuner" in annotation, f"{one.__name__}.{name}"
            if isinstance(mark, Becomes):
                assert annotation_of(mark.setting) is not None, f"{one.__name__}.{name} becomes {mark.setting}"


def public_fields() -> list[tuple[str, Any, Mark]]:
    """Label, default and mark of each field, once: where it is written."""
    found = []
    for one in all_classes():
        for name, mark in one.marks().items():
            inherited = any(name in base.model_fields for base in one.__bases__ if issubclass(base, Names))
            if mark is not None and not (inherited and one.__bases__[0].marks()[name] == mark):
                default = one.model_fields[name].get_default(call_default_factory=True, validated_data={})
                found.append((f"{one.__name__.replace('_Trainer', 'RLTrainer')}.{name}", default, mark))
    return found


def tables() -> list[str]:
    """The rows of the tables in docs/migrate.md."""
    become: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    inert: dict[str, list[str]] = {}
    for label, default, mark in public_fields():
        if isinstance(mark, Becomes):
            become.setdefault(f"`{mark.setting}`", []).append(f"`{label}`")
        elif isinstance(mark, Apart):
            become.setdefault(mark.becomes, []).append(f"`{label}`")
        elif isinstance(mark, Only):
            refused.setdefault(mark.because, []).append(f"`{label}` other than `{default}`")
        else:
            inert.setdefault(mark.because, []).append(f"`{label}`")
    names = {because: [f"`{name}`"] for name, because in door.REFUSED.items()}
    return [
        f"| {', '.join(fields)} | {text} |"
        for table in (become, refused, names, inert)
        for text, fields in table.items()
    ]


def test_every_name_and_field_is_in_the_migration_page() -> None:
    text = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    missing = [row for row in tables() if row not in text.splitlines()]
    assert not missing, "\n" + "\n".join(missing)
    assert [name for name in door.__all__ if f"`{name}" not in text] == []


def test_nothing_but_the_command_needs_the_doors() -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "sys.modules['groupwise.compat'] = None\n"
        "import groupwise\n"
        "for module in pkgutil.walk_packages(groupwise.__path__, 'groupwise.'):\n"
        # Kernels need triton, which a GPU's torch brings along.
        "    if not module.name.startswith('groupwise.compat') and not module.name.endswith(('__main__', '_kernel')):\n"
        "        importlib.import_module(module.name)\n"
        "from groupwise.cli import main\n"
        "sys.exit(main(['algorithms']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
