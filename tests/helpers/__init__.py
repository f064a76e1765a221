"""What several tests share."""

from pathlib import Path

# The root of the repository: child processes import relex and tests from here.
ROOT = Path(__file__).parents[2]
