"""How each kind of server is spoken to (`groupwise.engines.dialects.base`)."""
