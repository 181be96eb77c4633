"""What the scripts share: data, models, training, masks, regrowth, search and plots."""
import sys
from importlib.util import find_spec

# the one check at import time: each script imports this first, and says in a line what it lacks instead of a traceback
if missing := [name for name in ("torch", "torchvision", "numpy", "scipy", "skimage", "matplotlib", "tqdm")
               if find_spec(name) is None]:
    print(f"error: {', '.join(missing)} not installed for {sys.executable}; install with: {sys.executable} -m pip "
          "install -r requirements.txt, or use .venv/bin/python after `make demo`", file=sys.stderr)
    sys.exit(2)
