"""Docs that can be checked: generated pages, links, and what must not be in the tree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "generate_docs.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if not target.startswith("http"):
            found = page.parent / target if target else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the names of the headings of a page, as links spell them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_named_in_the_code_exist() -> None:
    missing = set()
    for top in ("walbd", "storage", "proxy", "archive", "protocol", "ext", "tests", "scripts"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".pyx", ".h") and path.is_file():
                for name in re.findall(r"docs/[a-z0-9/-]+\.md", path.read_text()):
                    if not (ROOT / name).exists():
                        missing.add((name, str(path.relative_to(ROOT))))
    assert not missing
