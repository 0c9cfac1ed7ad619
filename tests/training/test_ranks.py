"""Training processes side by side: what they average and share is the same in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from training import ranks

ranks.start()
mine = [torch.tensor([1.0, 2.0]) * (ranks.RANK + 1), torch.full((2, 2), float(ranks.RANK))]
ranks.average(mine)
first = torch.tensor([10.0 + ranks.RANK])
ranks.share([first])
seen = [ranks.RANK, mine[0].tolist(), mine[1].tolist(), first.tolist()]
Path(sys.argv[1], f"{ranks.RANK}.json").write_text(json.dumps(seen))
ranks.stop()
"""


def test_two_processes_agree(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *(p for p in sys.path if p)])
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    expected = [[1.5, 3.0], [[0.5, 0.5], [0.5, 0.5]], [10.0]]
    assert results == [[0, *expected], [1, *expected]]
