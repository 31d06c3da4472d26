"""Measurements that benchmarks/inference.py, finetune.py and gpu.py share."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The package, the tests' random batches, and their PyTorch modules.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
