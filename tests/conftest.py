"""No test asks the real Hub (tests/stand_in_hub.py answers those that ask one)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
