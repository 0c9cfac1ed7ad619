"""Which versions of vLLM METok is made for.

METok overrides methods that vLLM does not promise to keep, so another minor version is refused
(`plugin.py: register`) until somebody has read its changes. `pyproject.toml` states the same range to pip.

Where the accepted versions differ, METok does what is right with each, in a module named for the difference:

- `scheduler/queue_order.py`: 0.33 steps over a waiting request that gets no token;
- `media/request_limits.py`: 0.33 bounds the media of a request, all of them together;
- `worker/requests.py: PrunedRequest.question`: 0.33 drops a video's data once its tokens are computed, so the
  question is read when the request arrives. That is right with both;
- `scheduler/scheduler.py: MetokScheduler._end_refused`: 0.33 takes the sentence with which a request ends.

`tests/unit/test_vllm_versions.py` says when each can go.
"""

from __future__ import annotations

import re

OLDEST = (0, 32)
NEWEST = (0, 33)


def refuse_version(version: str) -> None:
    """Refuse a vLLM that METok is not made for.

    Args:
        version: as vLLM states it, such as "0.32.0", "0.33.1+cu129" or "0.33.0rc2.dev5+g1a2b3c4".

    Raises:
        ImportError: in one sentence.
    """
    stated = re.match(r"(\d+)\.(\d+)", version)
    if stated is None or not OLDEST <= (int(stated[1]), int(stated[2])) <= NEWEST:
        raise ImportError(f"METok is made for vLLM {_shown(OLDEST)} to {_shown(NEWEST)}, and this is vLLM {version}.")


def _shown(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
