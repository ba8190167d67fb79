from __future__ import annotations

import sys

from groupwise.cli.app import main

sys.exit(main())
