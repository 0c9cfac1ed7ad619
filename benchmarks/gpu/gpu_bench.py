"""`python -m benchmarks.gpu` by its path, from the repository's root: for a carried folder, where nothing is
installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "kernels")]
    from benchmarks.gpu.cli import main

    sys.exit(main())
