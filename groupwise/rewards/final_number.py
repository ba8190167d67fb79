r"""Reading the one number that a final answer states.

The reader is lenient about dress (`$72`, `**72**`, `1,000`, `\boxed{72}`, `72.0`, `72 dollars`) and strict about
doubt: a fraction, a range, a list or an unfinished sum is no number, and of several numbers only the first counts, so
that hedging (`70 71 72`, `71 or 72`) earns nothing.
"""

from __future__ import annotations

import re
from decimal import Decimal

_MAX_DIGITS = 100
_MINUS = "\\-\u2212\u2013"
_NUMBER = re.compile(
    rf"(?P<sign>[{_MINUS}])?(?:[$€£¥₹]\s?)?(?P<inner_sign>[{_MINUS}])?"
    r"(?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)(?P<exponent>[eE][+-]?\d{1,3}(?!\d))?"
)
_CONTINUES = re.compile(
    rf"\s*(?:[{_MINUS}+*/^×÷⁄:·]|[xX]|\\(?:times|cdot|div|over)\b)\s*[$(]?\d"  # an operator and another number
    r"|\s+\d|[.,]\d|\s*[²³½¼¾]"
)
_COMMAND_BEFORE = re.compile(r"\\[a-zA-Z]+\{?$")
_WRAPPERS = re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf)\s*\{")
_DRESS = (("**", ""), ("__", ""), ("`", ""), ("\\$", "$"), ("{,}", ","), ("\\,", ""), ("\\!", ""))


def read_number(text: str) -> Decimal | None:
    r"""The number that `text` states on its first line, or None when it states none, or more than one.

    What stands before the last `=` is working: `6 * 12 = 72` reads as 72.

    Example:
        >>> read_number(" **$1,000.50** per day"), read_number("3/4")
        (Decimal('1000.50'), None)
    """
    line = text.strip().split("\n", 1)[0].rsplit("=", 1)[-1]
    for dressed, plain in _DRESS:
        line = line.replace(dressed, plain)
    line = _WRAPPERS.sub("", line)
    match = _NUMBER.search(line)
    if match is None or len(match["digits"]) > _MAX_DIGITS:
        return None
    if _CONTINUES.match(line, match.end()) or _COMMAND_BEFORE.search(line, 0, match.start()):
        return None
    if match["sign"] and match.start() and line[match.start() - 1].isalnum():
        return None
    number = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    negative = bool(match["sign"]) != bool(match["inner_sign"])
    return number.copy_negate() if negative else number  # unary minus would round to the context's precision
