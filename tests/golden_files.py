"""Where the recordings of the original implementations are: tests/golden, or $NEO_GOLDEN_DIR."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("NEO_GOLDEN_DIR", Path(__file__).parent / "golden"))
