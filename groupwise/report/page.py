"""The page: one file of HTML with its styles, its program and its data, which asks no network for anything.

Data are JSON, compressed, in base64: no text of a model or of data is ever markup. The policy in its head lets run just
the program that is in it, named by its hash, and lets it load nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from groupwise.texts import encodable

_SCRIPTS = ("dom", "format", "data", "charts", "tokens", "overview", "curves", "samples", "evals", "settings", "main")


def compact(value: Any) -> str:
    """JSON in ASCII; NaN and infinities, which a file of somebody else may hold, are null."""
    try:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def packed(value: Any) -> str:
    """`compact` JSON, compressed, in base64."""
    return base64.b64encode(gzip.compress(compact(value).encode(), compresslevel=6, mtime=0)).decode("ascii")


def page(title: str, parts: Iterable[tuple[str, str]] = (), *, live: bool = False) -> Iterator[str]:
    """The file, piece by piece.

    Args:
        title: of its window.
        parts: names and `packed` contents.
        live: it asks the server that it comes from for its data.
    """
    style = _asset("vendor/uPlot.min.css") + _asset("report.css")
    program = f'"use strict";\n{_asset("vendor/uPlot.iife.min.js")}\n' + "\n".join(
        _asset(f"js/{name}.js") for name in _SCRIPTS
    )
    policy = (
        f"default-src 'none'; script-src '{_hash(program)}'; style-src '{_hash(style)}'; img-src data:; "
        f"connect-src {_QUOTED_SELF if live else _QUOTED_NONE}; base-uri 'none'; form-action 'none'"
    )
    yield (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(encodable(title))}</title>\n<style>{style}</style>\n</head>\n"
        f'<body data-live="{"yes" if live else "no"}">\n<noscript>This page is drawn by a program that is inside it; '
        'let scripts run to see it.</noscript>\n<div id="app"></div>\n'
    )
    for name, content in parts:
        yield f'<script type="application/octet-stream" data-part="{escape(name)}">{content}</script>\n'
    yield f"<script>{program}</script>\n</body>\n</html>\n"


_QUOTED_SELF, _QUOTED_NONE = "'self'", "'none'"


def _asset(name: str) -> str:
    return files("groupwise.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
