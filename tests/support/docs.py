"""Finds what a page names and is not there: files, what they define, modules, links, anchors, sections."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHOD = ROOT / "docs" / "method.md"

BASES = (ROOT, ROOT / "metok_vllm", ROOT / "tests", ROOT / "kernels" / "metok_kernels")
"""Where a path on a page may start, beside the page's own folder. `vllm/...` starts where vLLM is."""

MADE_LATER = ("out", "runs", ".venv", ".whl")
"""Folders that commands make; what is named in them need not be there."""

ELSEWHERE = ("metok_aligner/",)
"""Paths in a folder of the reader's own."""

PLACEHOLDERS = ("MODEL", "NAME", "FAMILY")
"""Words in a path or a command that the reader fills in."""

SUFFIXES = (".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".json", ".csv", ".png", ".txt", ".pth")
UNIQUE = (".py", ".md", ".sh", ".toml", ".yaml", ".yml")
"""Endings of a bare file name, without a folder, that must be the name of some file in the repository."""

OWN_MODULES = ("benchmarks", "training", "tests", "metok_vllm", "metok_kernels")

CODE = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w.@+-]+(?:/[\w.@+-]+)*/?")
DEFINED = re.compile(r"([\w./+-]+\.py): ([A-Za-z_][\w.]*(?:, [A-Za-z_][\w.]*)*)")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)")
MODULE = re.compile(r"python3? -m ([A-Za-z_][\w.]*\w)")
HEADING = re.compile(r"#{1,6} +(.+)")
NUMBER = r"\d+(?:\.\d+)?(?:(?:, | and | to )\d+(?:\.\d+)?)*"
CITATION = re.compile(rf"method\.md`?,? (?:sections? )?({NUMBER})(?:,? rules? ({NUMBER}))?")


def pages() -> list[Path]:
    """The pages that are held to this."""
    named = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "training/README.md"]
    return [ROOT / name for name in named if (ROOT / name).exists()] + sorted((ROOT / "docs").glob("*.md"))


def faults(page: Path) -> list[str]:
    """Everything that a page names and that is not there, each as `page:line: what`."""
    called = page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name
    found = []
    for number, line, is_code in lines(page.read_text("utf-8")):
        wrong = list(missing_modules(line))
        if not is_code:
            for token in CODE.findall(line):
                wrong += missing(page, token)
            for target in LINK.findall(CODE.sub("``", line)):
                wrong += broken(page, target[0] or target[1])
        found += [f"{called}:{number}: {what}" for what in wrong]
    return found + [f"{called}: {what}" for what in missing_sections(page.read_text("utf-8"))]


def lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """Number, text, and whether it stands in a fenced block, of every line."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        else:
            yield number, line, fenced


# --- files and what is defined in them ---


def missing(page: Path, token: str) -> Iterator[str]:
    """What is wrong with a path in backticks, or a path and names; nothing where it is no path of ours."""
    if match := DEFINED.fullmatch(token):
        file = find(page, match[1])
        if file is None:
            yield f"there is no {match[1]}"
            return
        for name in match[2].split(", "):
            if name not in definitions(file):
                yield f"{match[1]} defines no {name}"
    elif PATH.fullmatch(token) and is_ours(page, token) and find(page, token) is None:
        yield f"there is no {token}"


def is_ours(page: Path, token: str) -> bool:
    first, _, rest = token.partition("/")
    if first in MADE_LATER or token in ELSEWHERE or any(word in token for word in PLACEHOLDERS):
        return False
    if not rest and not token.endswith("/"):
        return token.endswith(UNIQUE)
    known = any((base / first).exists() for base in (*BASES, page.parent))
    return known or token.endswith((*SUFFIXES, "/"))


def find(page: Path, token: str) -> Path | None:
    """The file or folder of that path, or of that bare name wherever it is."""
    if token.startswith("vllm/"):
        base = vllm_folder()
        return base / token.removeprefix("vllm/") if base and (base / token.removeprefix("vllm/")).exists() else None
    for base in (page.parent, *BASES):
        path = (base / token).resolve()
        if path.exists() and (path.is_relative_to(ROOT) or path.is_relative_to(page.parent)):
            return path
    return by_name().get(token)


@cache
def vllm_folder() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


@cache
def by_name() -> dict[str, Path]:
    """Every file of the repository by its bare name, and every folder by its name with a slash."""
    names: dict[str, Path] = {}
    for folder, inside, files in os.walk(ROOT):
        inside[:] = [name for name in inside if name not in (*MADE_LATER, ".git", "__pycache__")]
        names |= {name: Path(folder, name) for name in files} | {f"{name}/": Path(folder, name) for name in inside}
    return names


@cache
def definitions(file: Path) -> frozenset[str]:
    """Functions, classes and values that a module defines, and what its classes hold as `Class.name`."""
    return frozenset(defined(ast.parse(file.read_text("utf-8")).body, ""))


def defined(body: list[ast.stmt], before: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield before + node.name
        elif isinstance(node, ast.ClassDef):
            yield before + node.name
            yield from defined(node.body, f"{before}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (before + target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield before + node.target.id


def missing_modules(line: str) -> Iterator[str]:
    """Modules of ours that a command runs and that are not there."""
    for name in MODULE.findall(line):
        parts = name.split(".")
        if parts[0] in OWN_MODULES and not any(word in parts for word in PLACEHOLDERS):
            path = (ROOT / "kernels" if parts[0] == "metok_kernels" else ROOT).joinpath(*parts)
            if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
                yield f"there is no module {name}"


# --- links ---


def broken(page: Path, target: str) -> Iterator[str]:
    if re.match(r"[a-z]+:", target):
        return  # of another site
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    if not file.exists() or not (file.is_relative_to(ROOT) or file.is_relative_to(page.parent)):
        yield f"the link {target} leads nowhere"
    elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8")):
        yield f"{name or 'this page'} has no heading #{anchor}"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, as GitHub makes it of them."""
    found: set[str] = set()
    for _, line, is_code in lines(text):
        if not is_code and (match := HEADING.fullmatch(line.strip())):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1])
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            same = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
            found.add(f"{slug}-{same}" if same else slug)
    return found


# --- the method's sections ---


def cited(text: str) -> list[str]:
    """Sections of the method that a text cites: `sections 1.5 and 4` are 1.5 and 4, `1, rule 6` 1 and 1.6."""
    found = []
    for numbers, rules in CITATION.findall(re.sub(r"\s+(?:#\s)?", " ", text)):
        found += re.findall(r"\d+(?:\.\d+)?", numbers)
        found += [f"{numbers}.{rule}" for rule in re.findall(r"\d+", rules)]
    return found


def sections() -> set[str]:
    """Numbers of the method's headings."""
    return set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", METHOD.read_text("utf-8"), re.MULTILINE))


def missing_sections(text: str) -> list[str]:
    return [f"docs/method.md has no section {number}" for number in cited(text) if number not in sections()]


def table_rows(text: str) -> list[list[str]]:
    """Cells of every row of every table, heads and rulers aside."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    rulers = [i for i, line in enumerate(text.splitlines()) if line.startswith("|---")]
    heads = {text.splitlines()[i - 1] for i in rulers}
    return [row for row in rows if not any(row[0] == head.strip("| ").split(" | ")[0] for head in heads)]
