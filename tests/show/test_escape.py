"""Nothing that a model, a tokenizer, a user or a file name says becomes part of the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_results import made_results

from surgeon.show.page import write_report

HOSTILE = (
    "<script>document.title='x'</script>",
    '"><img src=x onerror=document.title=1>',
    "' onmouseover='document.title=2",
    "</svg></style></title><script>document.title=3</script>",
    "{{7*7}}{% raw %}",
    "]]><!--",
    "javascript:alert(1)",
    "url(https://example.org/x) \u202e\ud800\x00\x1b[31m",
)


class Page(HTMLParser):
    """Counts elements with the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[tuple[str, ...]] = Counter()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag, *sorted(name for name, _ in attrs)] += 1
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href")
        ]


def page(folder: Path, text: str, name: str) -> str:
    folder.mkdir()
    for kind, result in made_results(text).items():
        document = json.dumps(result.to_json())
        (folder / f"{kind}{name}.json").write_text(document, encoding="utf-8")
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hostile text in every document and file name, and its report."""
    folder = tmp_path_factory.mktemp("report") / "run"
    page(folder, " ".join(HOSTILE), "\"><img src=x onerror='document.title=4'>")
    harmless = json.dumps(made_results("x")["measure"].to_json())
    (folder / "\u202eback.json").write_text(harmless, encoding="utf-8")
    (folder / "javascript:alert(1).json").write_text(harmless, encoding="utf-8")
    write_report(folder)
    return folder


@pytest.mark.slow
def test_hostile_text_creates_no_element_and_no_attribute(hostile: Path, tmp_path: Path):
    text = (hostile / "report.html").read_text(encoding="utf-8")
    kinds = set(Page(text).elements)
    plain = set(Page(page(tmp_path / "plain", "word " * 60, "")).elements)
    # a long text takes the same elements as a hostile one; what it says decides nothing
    assert kinds - plain == set()
    assert not [
        k
        for k in kinds
        if k[0] in ("script", "img", "iframe", "object", "embed", "link", "form", "foreignobject")
    ]
    assert not [name for k in kinds for name in k[1:] if name.startswith("on") or name == "style"]
    assert text.count("&lt;script&gt;") > 20  # it is all there, as text


def test_links_stay_in_the_folder(hostile: Path):
    links = Page((hostile / "report.html").read_text(encoding="utf-8")).links
    assert links
    assert all(re.fullmatch(r"\./[A-Za-z0-9_.~%-]+", link) for link in links)


def test_a_name_that_is_not_unicode_is_linked_and_shown():
    from surgeon.show.page.folder import shown
    from surgeon.show.page.page import link

    name = os.fsdecode(b"\xff.json")
    assert (link(name), shown(name).encode()) == ("./%FF.json", b"\\udcff.json")


@pytest.mark.slow
def test_the_page_asks_for_nothing_from_outside(tmp_path: Path):
    text = page(tmp_path / "run", "text", "")
    assert len(text.encode()) < 3_000_000
    without_namespaces = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[a-z0-9/]+"', "", text)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|javascript", without_namespaces)
    assert "default-src 'none'; style-src 'sha256-" in text


@pytest.mark.slow
def test_nothing_runs_in_a_browser(hostile: Path, tmp_path: Path):
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if chromium is None:
        pytest.skip(
            "there is no browser to open the page in; install Debian's package: apt-get install"
            " chromium"
        )

    def opened(path: Path) -> tuple[str, str, str]:
        """Title, page and log after the browser has run what it would run."""
        flags = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
        )
        command = [chromium, *flags, "--dump-dom", path.as_uri()]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return title(ran.stdout), ran.stdout, ran.stderr

    def title(text: str) -> str:
        return unescape(re.findall(r"<title>(.*?)</title>", text, re.DOTALL)[0])

    report = hostile / "report.html"
    written = report.read_text(encoding="utf-8")
    shown, page, log = opened(report)
    assert shown == title(written)
    assert set(Page(page).elements) == set(Page(written).elements)
    assert "CONSOLE" not in log

    runs = (
        tmp_path / "runs.html"
    )  # the control: where something runs, both title and console show it
    runs.write_text(
        "<title>before</title><script>document.title = 'after'; console.log('ran')</script>"
    )
    shown, _, log = opened(runs)
    assert shown == "after"
    assert "CONSOLE" in log
