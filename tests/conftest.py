"""Tests run from anywhere, import the core, plumbing and lab, and find the optional real films."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
REAL = ROOT.parent / "shared" / "cxr"  # real radiographs, where somebody has put them there
sys.path[:0] = [str(ROOT), str(TESTS)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
