"""The second witness on its real model against the oracle;
only where `make witness` has fetched the model.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.utils import is_accelerate_available

from benchmarks.common.paths import ROOT
from benchmarks.witness import methods, run, world
from benchmarks.witness.model import Decoder, load
from tests.support.oracle.run import Prefill, decode
from tests.support.oracle.settings import OracleSettings
from tests.support.oracle.stage2 import Video

PACKAGES = ROOT / "runs/witness/packages"
STEPS = 9


@pytest.mark.skipif(not (PACKAGES / "packages.json").exists(), reason="`make witness` has not fetched the model here")
def test_real_model_against_the_oracle_and_its_own_forward():
    there = is_accelerate_available()
    model, tokenizer = load(PACKAGES, torch.float32)
    assert is_accelerate_available() == there  # what it was read with is gone: transformers was imported without
    witness = run.Witness(Decoder(model), world.Prompt(tokenizer))
    decoder, prompt, video = witness.decoder, witness.prompt, world.make_video(0, 99)
    with torch.no_grad():
        grid = world.tower_grid(witness.frames(video))

    question = video.questions[2]
    before, after = prompt.before(), prompt.after(question)
    ids = torch.tensor([[*before, *(t for c in video.captions for t in prompt.frame(c)), *after]])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(STEPS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    tokens = ids[0, start:].tolist()
    shared = witness.shared(video, 0)["stock"][0]
    assert methods.plain_hits(decoder, [shared], after, tokens) == [[True] * STEPS]
    with torch.no_grad():
        asked = decoder.embed(prompt.ids(question.text))
    fine = methods.stage1(grid, asked, methods.FINE)
    kept = methods.prefill(decoder, witness.before, fine, after, {})
    assert methods.hits(decoder, kept, [kept.cache], tokens) == [[True] * STEPS]

    llava = SimpleNamespace(
        model=SimpleNamespace(language_model=model.model),
        lm_head=model.lm_head,
        get_input_embeddings=model.get_input_embeddings,
    )
    visual = methods.stage1(grid, asked, methods.PAPER)
    begin, count = len(before), len(visual.rows)
    for layers, delta in ((run.FITTED, 1.0), (methods.selection.prune_layers(30), 0.5)):
        done = methods.prefill(decoder, witness.before, visual, after, methods.metok_schedule(visual, layers))
        cache = methods.released(done, layers, delta)
        with torch.no_grad():
            hidden = torch.cat([decoder.embed(before), visual.rows, decoder.embed(after)])
            is_text = [True] * begin + [False] * count + [True] * len(after)
            state = Prefill(llava, hidden, is_text, OracleSettings(decode_retention=delta, prune_layers=layers))
            key = visual.is_key.nonzero().flatten().tolist()
            state.videos = [Video(begin, visual.event.tolist(), key, list(range(begin, begin + count)))]
            state.run()
            tokens, _ = decode(llava, state, STEPS, None)
        assert [*(done.scores[limit][0].tolist() for limit in layers[:2]), []] == state.videos[0].after
        assert [sorted(p.tolist()) for p in cache.positions] == [sorted(p) for p in state.kv_positions]
        assert methods.hits(decoder, done, [cache], tokens) == [[True] * STEPS]
