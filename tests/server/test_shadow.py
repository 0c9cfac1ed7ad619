"""A real server that watches its own answers: what METok changed is seen, and nobody else notices.

The model is the trained one that comes along. METok prunes where that model still reads its video, so its
answers suffer; a request that loses nothing is the model's own answer to the bit.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from metok_vllm.demo.model_choice import SAMPLE, TRAINED
from metok_vllm.demo.questions import load_questions
from tests.server.test_metrics import read_metrics
from tests.support.server.asking import assert_drained
from tests.support.server.clips import data_url
from tests.support.server.live import Server, serving
from tests.support.until import until

SETTINGS = {"metok": {"shadow_rate": 1, "prune_layers": [1, 2, 3], "profile": "none", "status_shows_questions": True}}
LENGTH = 2048
NOTHING_LOST = {"stages": 1, "events": 1, "key_events": 1, "key_frames": 64, "strides": [2, 2, 2]}
"""Frames pooled as without METok, and one separator at the end."""


@pytest.fixture(scope="module")
def watching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        TRAINED, tmp_path_factory.mktemp("log") / "server.log", "--plugin", "metok", "--additional-config",
        json.dumps(SETTINGS), "--trust-request-mm-kwargs", "--shutdown-timeout", "40",
        "--dtype", "float32", "--enforce-eager", "--max-model-len",
        str(LENGTH), "--block-size", "32", "--served-model-name", "tiny", "--media-io-kwargs", '{"video": {"num_frames": 16}}',
    ) as running:  # fmt: skip
        yield running


def body(question: int = 0, metok: Any = None, **options: Any) -> dict[str, Any]:
    path, questions = load_questions(SAMPLE, None)
    url = {"type": "video_url", "video_url": {"url": data_url(path.read_bytes())}}
    text = {"type": "text", "text": questions[question % len(questions)].prompt}
    kwargs = {} if metok is None else {"mm_processor_kwargs": {"metok": metok}}
    messages = [{"role": "user", "content": [url, text]}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24, **kwargs, **options}


def ask(server: Server, name: str = "one", **stated: Any) -> httpx.Response:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=body(**stated), headers={"X-Request-Id": name}, timeout=120
    )
    assert answer.status_code == 200, answer.text
    return answer


def shadow(server: Server) -> Any:
    return json.loads(server.get("/v1/metok/status")[1])["shadow_of_this_process"]


def done(server: Server) -> int:
    return sum(shadow(server)["requests"].values())


def after(server: Server, count: int, before: int) -> Any:
    """What there is to see once `count` more requests are through."""
    until(lambda: done(server) >= before + count, seconds=120)
    found = shadow(server)
    assert sum(found["requests"].values()) == before + count
    return found


def compared(server: Server, name: str = "one", **stated: Any) -> httpx.Response:
    """As `ask`; waits until the answer has been compared, and nobody disturbs that."""
    before = shadow(server)["requests"]
    answer = ask(server, name, **stated)
    found = after(server, 1, sum(before.values()))["requests"]
    assert found == {**before, "compared": before["compared"] + 1}
    return answer


def distances(server: Server) -> tuple[float, float]:
    """How many there were, and their sum."""
    samples = read_metrics(server.get("/metrics")[1].decode())
    return samples["metok_shadow_kl_count"], samples["metok_shadow_kl_sum"]


def test_where_nothing_is_lost_both_agree(watching: Server) -> None:
    for question in range(2):
        compared(watching, question=question, metok=NOTHING_LOST)
    found = shadow(watching)
    assert found["rate"] == 1
    assert found["agreement"] == 1
    assert found["worst"] == []
    count, total = distances(watching)
    assert count == 2
    assert total < 1e-5


def test_where_the_wrong_layers_lose_the_video_it_is_seen(watching: Server) -> None:
    _, earlier = distances(watching)
    _, questions = load_questions(SAMPLE, None)
    for question in range(len(questions)):
        compared(watching, f"q{question}", question=question)
    found = shadow(watching)
    assert found["agreement"] < 1
    assert distances(watching)[1] > earlier + 1
    worst = found["worst"][0]
    assert worst["agreement"] < 1
    assert worst["request_id"].startswith("chatcmpl-q")
    assert worst["question"] == questions[int(worst["request_id"][10:])].prompt.replace("\n", "\\n")[:500]
    assert f"METok: {worst['request_id']} is among the answers farthest" in watching.log.read_text()


def test_streams_samples_and_ends_by_a_string(watching: Server) -> None:
    lines = compared(watching, stream=True, stream_options={"include_usage": True}).text.splitlines()
    assert lines[-2] == "data: [DONE]"
    assert 'logprobs":{' not in "".join(lines)
    drawn = compared(watching, n=3, temperature=1.5, seed=1, min_tokens=6, max_tokens=6).json()
    assert len(drawn["choices"]) == 3
    assert "prompt_token_ids" not in drawn or drawn["prompt_token_ids"] is None
    whole = compared(watching, question=6).json()["choices"][0]["message"]["content"]
    assert len(whole) > 1
    ended = compared(watching, question=6, stop=[whole[-1]]).json()["choices"][0]
    assert ended["finish_reason"] == "stop"
    assert ended["stop_reason"] == whole[-1]


def test_what_cannot_be_asked_again(watching: Server) -> None:
    before = shadow(watching)["requests"]
    short = ask(watching, use_beam_search=True, n=2, max_tokens=2).json()["usage"]["prompt_tokens"]
    found = after(watching, 1, sum(before.values()))
    assert found["requests"] == {**before, "unrepeatable": before["unrepeatable"] + 1}
    # Without METok the model has no room for this one.
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    word = len(tokenizer("Look. " * 100).input_ids) - len(tokenizer("Look. " * 99).input_ids)
    question, text = body()["messages"][0]["content"], "Look. " * ((LENGTH - 8 - short) // word)
    content = [*question, {"type": "text", "text": text}]
    prompt = ask(watching, messages=[{"role": "user", "content": content}], max_tokens=1).json()["usage"]
    assert LENGTH - 20 < prompt["prompt_tokens"] < LENGTH
    found = after(watching, 1, sum(before.values()) + 1)
    assert found["requests"]["unrepeatable"] == before["unrepeatable"] + 2


def test_what_has_no_compressed_video_or_no_answer(watching: Server) -> None:
    before = done(watching)
    text = [{"role": "user", "content": "Say something."}]
    ask(watching, messages=text)
    ask(watching, metok="off")
    refused = httpx.post(f"{watching.url}/v1/chat/completions", json=body(metok={"evants": 3}), timeout=120)
    assert refused.status_code == 400
    with pytest.raises(httpx.ReadTimeout):  # its client goes away
        httpx.post(f"{watching.url}/v1/chat/completions", json=body(max_tokens=800, ignore_eos=True), timeout=0.5)
    time.sleep(3)
    assert done(watching) == before


def test_a_storm_loses_nothing(watching: Server) -> None:
    before = done(watching)
    alone = [ask(watching, question=i).json()["choices"][0]["message"]["content"] for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(watching, question=i % 4).json(), range(16)))
    assert [one["choices"][0]["message"]["content"] for one in answers] == [alone[i % 4] for i in range(16)]
    found = after(watching, 20, before)
    assert found["requests"]["failed"] == 0
    assert found["requests"]["busy"] >= 1, "few may wait"
    figures = json.loads(watching.get("/v1/metok/status")[1])["engine_figures"]["scheduler"]
    assert figures["requests"] == 0
    assert_drained(watching)


def test_metoks_own_requests_count_nowhere(watching: Server) -> None:
    status = json.loads(watching.get("/v1/metok/status")[1])
    assert not [one for one in status["requests"] if "shadow" in one["request_id"]]
    samples = read_metrics(watching.get("/metrics")[1].decode())
    assert samples["metok_pruned_requests_total"] < samples["metok_shadow_kl_count"] + 20
    outcomes = shadow(watching)["requests"]
    assert outcomes == {outcome: samples[f"metok_shadow_requests_total{{outcome={outcome}}}"] for outcome in outcomes}
    assert samples["metok_shadow_agreement_count"] == samples["metok_shadow_kl_count"] == outcomes["compared"]


def test_a_comparison_keeps_no_server_from_ending(watching: Server) -> None:
    """The last test of this file: it ends the server."""
    before = watching.log.read_text()
    ask(watching, max_tokens=250, ignore_eos=True)
    time.sleep(0.5)
    started = time.monotonic()
    watching.process.send_signal(signal.SIGTERM)
    watching.process.wait(timeout=60)
    assert time.monotonic() - started < 30
    log = watching.log.read_text()
    assert "request processing complete" in log
    assert "metok_vllm/" not in log.removeprefix(before), "vLLM 0.32 logs a traceback of its own where it drains"
    assert "METok: " not in log.removeprefix(before)
    assert "was not decoded" not in log
