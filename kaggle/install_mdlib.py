"""Install the wheels that lie with this file, without a network. The notebooks run it on Kaggle."""

import importlib
import subprocess
import sys
from pathlib import Path

wheels = sorted(map(str, Path(__file__).parent.glob("*.whl")))
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)
importlib.invalidate_caches()
