"""What stands beside a request's items: METok's own arguments, the stock processor's, and the frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "metok"
SCOPE = "videos_kwargs"
"""Where transformers and vLLM have the arguments of videos alone; METok's own go there, by `KEY`."""


def own_kwargs(hf_kwargs: Mapping[str, Any]) -> Any:
    """What METok has put there; None where it has put nothing."""
    return dict(hf_kwargs.get(SCOPE) or {}).get(KEY)


def stock_kwargs(hf_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All else. With METok's own among them vLLM would build a processor for every setting."""
    scope = {key: value for key, value in dict(hf_kwargs.get(SCOPE) or {}).items() if key != KEY}
    rest = {key: value for key, value in hf_kwargs.items() if key != SCOPE}
    return {**rest, SCOPE: scope} if scope else rest


def frames_of(videos: Any, index: int) -> Any:
    """The frames of a parsed video, [F, ...]. Some models get them with the metadata, in a pair."""
    item = videos.get(index)
    return item[0] if isinstance(item, tuple) else item
