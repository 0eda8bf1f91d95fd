"""Tests run from anywhere, import the core, plumbing and lab, and find the optional real films."""

import os
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
REAL = ROOT.parent / "shared" / "cxr"  # real radiographs, where somebody has put them there
sys.path[:0] = [str(ROOT), str(TESTS)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# nohup and a shell's & silence signals for all that they start; the tests of signals need them.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
