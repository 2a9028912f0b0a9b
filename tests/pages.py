"""What every page must be: alone, readable by all, and shown by a browser without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

VOID = {"meta", "link", "img", "br", "input", "hr"}
HOSTILE = "<img src=x onerror=alert(1)>\"'&$a$\\foo"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Page(HTMLParser):
    """Tags with their attributes, ids, the text of each section, and whether every tag is closed in its turn."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {"": ""}
        self.section = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute of <{tag}> is given twice"
        if tag == "section":
            self.section = str(given["id"])
            self.text[self.section] = ""
        self.tags.append((tag, given, tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text[self.section] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text.values()).split())

    @property
    def verdict(self) -> str:
        (found,) = re.findall(r'<p class="verdict">(.*?)</p>', self.source)
        return str(found)


def check_that_it_stands_alone_and_can_be_read_by_all(page: Page, links: Sequence[str] = ()) -> None:
    """It may link to the files named, and loads none."""
    names = [name for name, _, _ in page.tags]
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(names)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'")
    for name, attributes, _ in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            if key in attributes:
                may_link = name == "a" and key == "href" and attributes[key] in links
                assert may_link or str(attributes[key]).startswith(("#", "data:")), attributes
    for address in re.findall(r"url\(([^)]*)\)", page.source):
        assert address.startswith("#")
    assert "@import" not in page.source
    ids = [str(a["id"]) for _, a, _ in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in page.tags:
        for key in ("aria-labelledby", "aria-describedby"):
            assert set(str(attributes.get(key, "")).split()) <= set(ids)
        if str(attributes.get("href", "")).startswith("#"):
            assert str(attributes["href"])[1:] in ids
    assert page.all("html") == [{"lang": "en"}]
    assert {"header", "nav", "main", "footer"} <= set(names)
    assert names.count("h1") == 1
    levels = [int(name[1]) for name in names if re.fullmatch(r"h[1-6]", name)]
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"]
    # beside each figure the same in numbers
    tables = {str(a["id"]) for _, a, _ in page.tags if a.get("class") == "scroll" and "id" in a}
    assert page.all("figure")
    assert all(figure["aria-describedby"] in tables for figure in page.all("figure"))
    for name, attributes, inside in page.tags:
        if name == "th":
            assert attributes["scope"] in ("row", "col")
        if name == "pre" or attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0", "what scrolls is reached by the keyboard"
        if name == "caption":
            assert inside[-1] == "table"
    assert names.count("caption") == names.count("table")


def browser(page: Path, *options: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", f"--user-data-dir={folder}", "--allow-file-access-from-files"),
    ]
    return subprocess.run([*command, *options, page.as_uri()], check=True, capture_output=True, timeout=300)


def check_that_a_browser_shows_it(page: Page, file: Path, scratch: Path, num_figures: int) -> None:
    """Without a complaint, in light and in dark, on paper, and on a phone without being wider than it."""
    profile = scratch / "profile"
    complaining = scratch / "complaining.html"
    complaining.write_text("<script>console.error('seen')</script>")
    assert b"CONSOLE" in browser(complaining, "--dump-dom", folder=profile).stderr, "the test would see a complaint"
    shown = browser(file, "--dump-dom", folder=profile)
    assert b"CONSOLE" not in shown.stderr
    assert page.verdict in shown.stdout.decode()
    # as the browser understood it, the figures are inside it still
    assert shown.stdout.count(b"<svg ") == num_figures
    shades = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        picture = scratch / f"{name}.png"
        size = "--window-size=900,1200"
        browser(
            file, size, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", folder=profile
        )
        pixels = np.asarray(Image.open(picture).convert("L"))
        shades[name] = float(np.median(pixels))
        assert pixels.std() > 10
    assert shades["light"] > 230
    assert shades["dark"] < 60
    browser(file, f"--print-to-pdf={scratch / 'report.pdf'}", folder=profile)
    assert (scratch / "report.pdf").read_bytes().startswith(b"%PDF")
    phone = scratch / "phone.html"
    phone.write_text(
        f"<body style='margin:0'><iframe width=375 height=800 style='border:0' src='{file.as_uri()}' "
        "onload='document.title = this.contentDocument.documentElement.scrollWidth'></iframe>"
    )
    title = re.search(rb"<title>(\d+)</title>", browser(phone, "--dump-dom", folder=profile).stdout)
    assert title
    assert int(title[1]) <= 375, "nothing is wider than a phone"
