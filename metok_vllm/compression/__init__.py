"""METok's compression as pure functions on tensors: the method itself, without any engine.

The stages of the method (docs/method.md), each step in its module:

1. While encoding: `events` cuts a video into events, `alignment` scores frames against the question,
   `tiers` decides how finely each frame is kept, in counts known beforehand, and `pooling` makes the tokens.
2. In prefill: `selection` says which layers prune and how much each event keeps, `scoring` is the reference
   of the scores it chooses by.
3. While decoding: `retention` picks the visual KV that decoding may keep.
4. `accounting` is the arithmetic behind any claim.

Beneath them: `ordering` (what "the best by score" means, ties and NaN included), `ratios` (exact shares) and
`cosine`. Nothing here needs more than torch, and no function on tensors waits for the device.
"""
