"""`tpu/` is not an installed package: the planner's tests import it from the repository."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
