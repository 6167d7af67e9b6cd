"""Where things are."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TINY = ROOT / "weights" / "tiny"
CACHE = ROOT / ".cache"
