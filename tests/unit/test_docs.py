"""What the documentation names is there: sections, files, functions, tests, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.docs import METHOD, ROOT, anchors, cited, faults, missing_sections, pages, sections, table_rows

SOURCES = sorted(
    path
    for folder in ("metok_vllm", "kernels", "benchmarks", "training", "tests", "cpu")
    for path in (ROOT / folder).rglob("*.py")
)
README_LINES, README_COLUMNS = 150, 120


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    assert faults(page) == []


def test_sections_of_the_method_that_code_cites_are_there() -> None:
    found = {path: cited(path.read_text("utf-8")) for path in SOURCES if path != Path(__file__)}
    citing = {path: numbers for path, numbers in found.items() if numbers}
    assert len(citing) > 30, "the citations are written in a way that the checker does not know"
    wrong = {str(path): [n for n in numbers if n not in sections()] for path, numbers in citing.items()}
    assert {path: numbers for path, numbers in wrong.items() if numbers} == {}


def test_every_rule_of_the_method_has_code_and_a_test() -> None:
    numbers = sections()
    assert {"1", "2", "3", "4", "5", "1.1", "1.2", "1.3", "1.4", "1.5", "1.6"} <= numbers
    rows = table_rows(METHOD.read_text("utf-8").split("\n## Rule, code, test\n")[1])
    for rule, *cells in rows:
        assert len(cells) >= 2, rule
        assert all(re.search(r"`[\w/]+(\.py\b|/`)", cell) for cell in cells), f"{rule}: a cell names no file"
    covered = {number for rule, *_ in rows for number in re.findall(r"\b\d(?:\.\d)?\b", rule)}
    parents = {number.split(".")[0] for number in numbers if "." in number}
    assert numbers - parents - covered == set()


def test_the_files_on_a_requests_way_are_counted_right() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    way = text.split("\n## One video request, hop by hop\n")[1].split("\n## ")[0]
    (stated,) = re.findall(r"\*\*(\d+) files\*\*", way)
    named = {file for row in table_rows(way) for cell in row for file in re.findall(r"`([\w/]+\.py)", cell)}
    assert len(named) == int(stated)
    hops = [int(row[0]) for row in table_rows(way)]
    assert hops == list(range(1, len(hops) + 1))


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > README_COLUMNS] == []


# --- the checker itself ---

WRONG = {
    "a file": ("see `metok_vllm/worker/bacth.py`", "no metok_vllm/worker/bacth.py"),
    "a file by its short path": ("see `worker/bacth.py`", "no worker/bacth.py"),
    "a bare name": ("see `bacth.py`", "no bacth.py"),
    "a folder": ("see `metok_vllm/workers/`", "no metok_vllm/workers/"),
    "a bare folder": ("see `basslines/`", "no basslines/"),
    "a folder without its slash": ("see `benchmarks/accurate`", "no benchmarks/accurate"),
    "a file outside the repository": ("see `../somewhere/else.py`", "no ../somewhere/else.py"),
    "a file of vLLM": ("see `vllm/v1/engine/cores.py`", "no vllm/v1/engine/cores.py"),
    "a function": ("`compression/events.py: segment, segments`", "compression/events.py defines no segments"),
    "a method": ("`worker/batch.py: DecoderStack.scores`", "worker/batch.py defines no DecoderStack.scores"),
    "a method of vLLM": ("`vllm/v1/request.py: Request.run`", "vllm/v1/request.py defines no Request.run"),
    "a test": ("`unit/test_docs.py: test_that_is_gone`", "unit/test_docs.py defines no test_that_is_gone"),
    "a definition in no file": ("`worker/bacth.py: f`", "no worker/bacth.py"),
    "a module": ("run `python -m benchmarks.acuracy`", "no module benchmarks.acuracy"),
    "a module in a block": ("```\npython -m training.make_sets --out x\n```", "no module training.make_sets"),
    "a link": ("[text](nowhere.md)", "the link nowhere.md leads nowhere"),
    "a picture": ("![text](nowhere.png)", "the link nowhere.png leads nowhere"),
    "a link by name": ("[text]: nowhere.md", "the link nowhere.md leads nowhere"),
    "an anchor": ("# Here\n[text](#there)", "this page has no heading #there"),
    "an anchor in another page": ("[text](other.md#there)", "other.md has no heading #there"),
    "a section": ("see docs/method.md sections 1.5 and 9.9", "docs/method.md has no section 9.9"),
    "a rule": ("see docs/method.md\nsection 1, rule 8", "docs/method.md has no section 1.8"),
}

RIGHT = """# A page
## Twice
## Twice
[a](#a-page) [b](#twice-1) [c](other.md#a-heading-with-code-and-a-link) [d](https://example.com/x.md#y)
`metok_vllm/worker/batch.py` `worker/batch.py: DecoderStack.scoring_layers` `unit/test_docs.py: WRONG` `batch.py`
`vllm/v1/core/sched/async_scheduler.py: AsyncScheduler` `docs/` `benchmarks/accuracy` `Makefile` `mine.jsonl`
`out/model/x.py` `runs/tower/tower.pt` `.venv/bin/metok` `tests/*.py` `/v1/metok/status` `llava-hf/llava-onevision`
`results/engine-MODEL.json` `metok_aligner/` `a/b` `1/2` `baselines/` `python -m benchmarks.NAME`, `python -m pip`
`python -m benchmarks.accuracy`
docs/method.md section 1, rules 5 and 6; docs/method.md 1.3, 2 and 4; `docs/method.md`, sections 1 to 4
"""


def page_of(folder: Path, text: str) -> Path:
    (folder / "other.md").write_text("### A heading with `code` and [a link](page.md)\n", "utf-8")
    page = folder / "page.md"
    page.write_text(text, "utf-8")
    return page


@pytest.mark.parametrize("what", WRONG)
def test_a_page_that_is_wrong_is_caught(tmp_path: Path, what: str) -> None:
    text, said = WRONG[what]
    (fault,) = faults(page_of(tmp_path, text))
    assert fault.endswith(said), fault


def test_a_page_that_is_right_is_not(tmp_path: Path) -> None:
    assert faults(page_of(tmp_path, RIGHT)) == []


def test_citations_are_read_in_every_form_in_use() -> None:
    assert cited("(docs/method.md section 2).") == ["2"]
    assert cited("docs/method.md sections 1.5, 1.6 and 4)") == ["1.5", "1.6", "4"]
    assert cited("see docs/method.md\n    # section 4, `decode_retention`") == ["4"]
    assert cited("docs/method.md section 5: 64 frames, 200 text tokens") == ["5"]
    assert cited("docs/method.md 1, rules 5 and 6") == ["1", "1.5", "1.6"]
    assert cited("(`docs/method.md`, sections 1 to 4)") == ["1", "4"]
    assert cited("written from docs/method.md alone: the judge") == []
    assert missing_sections("docs/method.md section 7") == ["docs/method.md has no section 7"]


def test_anchors_are_githubs() -> None:
    text = "# vLLM's hooks\n## 1.1 Frames, and more\n## Same\n## Same\n```\n# not a heading\n```\n"
    assert anchors(text) == {"vllms-hooks", "11-frames-and-more", "same", "same-1"}


def test_usage_in_a_docstring_has_one_command_a_line() -> None:
    """`--help` prints it as it stands; a re-wrap would run the commands together."""
    together = re.compile(r"python -m [a-z]\S* .*\bpython" + " -m [a-z]")
    found = [str(path) for path in SOURCES if path != Path(__file__) and together.search(path.read_text())]
    assert not found
