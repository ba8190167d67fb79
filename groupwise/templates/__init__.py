"""Chat templates, which are programs that come with models, applied within limits."""

from __future__ import annotations

from groupwise.templates.bounded import TemplateLimitError
from groupwise.templates.rendering import TemplateFault, apply_template

__all__ = ["TemplateFault", "TemplateLimitError", "apply_template"]
