"""`decode_retention`: visual KV that decoding keeps in the middle layers; `final_keep`: visual tokens that
pass L3 (docs/method.md sections 4.4 and 4.7). Both are a share of what survives L2, chosen by score.
"""

from torch import Tensor

from .ordering import top
from .ratios import ceil_share


def retained_count(survivors: int, delta_micro: int) -> int:
    """`ceil(delta * C2)`: how many of a request's `survivors` of L2 keep their KV in layers `L1 .. L3-1`, or
    with `final_keep` in place of delta how many pass L3.

    `survivors` counts all videos of the request together; `delta_micro` is in millionths (`ratios.to_micro`).
    """
    return ceil_share(survivors, delta_micro)


def retain(scores: Tensor, delta_micro: int) -> Tensor:
    """Mask, bool [C2], of the retained ones among the survivors of L2.

    `scores` is float [C2]: the scores that L2 chose by, of all the request's videos in prompt order; for
    `final_keep` the scores at L3. The highest are retained; ties: lowest index; NaN last.
    """
    return top(scores, retained_count(scores.shape[0], delta_micro))
