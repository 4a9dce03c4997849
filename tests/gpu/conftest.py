"""The cases and the models are those of tests/single."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "single"))
