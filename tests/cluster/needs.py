"""What the tests of this folder need: hosts in network namespaces, which root can make."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tools import testbed  # noqa: E402

REASON = testbed.unavailable() or (None if os.geteuid() == 0 else "not root")
needs_hosts = pytest.mark.skipif(REASON is not None, reason=f"no hosts can be made here: {REASON}")
