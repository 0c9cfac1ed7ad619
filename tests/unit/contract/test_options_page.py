"""docs/options.md says what the settings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "options.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_page_is_what_the_settings_say() -> None:
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_a_page_that_says_something_else_is_found(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "options.md"
    page.parent.mkdir()
    page.write_text((ROOT / "docs" / "options.md").read_text().replace("| `events` | `5`", "| `events` | `6`"))
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import options; from pathlib import Path; "
        f"options.PAGE = Path({str(page)!r}); sys.exit(options.main(['--check']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "run scripts/options.py" in done.stderr
