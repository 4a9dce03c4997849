"""The cases and the models are those of tests/single, and the timer is that of tools."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "single"), str(ROOT)]
