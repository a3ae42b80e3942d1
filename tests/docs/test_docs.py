"""The docs as a site: every page is in it, every link and anchor leads somewhere, nothing comes from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[test]'")


class Page(HTMLParser):
    """What a page of HTML has: anchors, links to follow, and what a browser loads by itself."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])
        if tag in ("script", "img", "iframe") and given.get("src"):
            self.loaded.append(given["src"])


def build(config, folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, "--site-dir", str(folder)], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(CONFIG, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(folder): Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}, folder


def test_every_page_of_the_docs_is_in_the_site(site):
    pages, _ = site
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md") if "site" not in path.parts]
    assert {path.with_suffix(".html") for path in sources} | {Path("index.html")} <= set(pages)


def test_every_link_and_anchor_leads_somewhere(site):
    pages, folder = site
    dead = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or name == Path("404.html"):  # that page's links begin at the site's root
                continue
            target = Path(os.path.normpath(name.parent / unquote(parts.path))) if parts.path else name
            target = target / "index.html" if (folder / target).is_dir() else target
            anchor = unquote(parts.fragment)
            if not (folder / target).is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                dead.append(f"{name}: {link}")
    assert not dead


def test_nothing_is_loaded_from_elsewhere(site):
    pages, _ = site
    loaded = {link for page in pages.values() for link in page.loaded}
    assert loaded and not [link for link in loaded if urlsplit(link).netloc]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](#no-such-heading)", "no-such-heading"),
        ("[gone](../benchmarks/gone.md)", "docs/page.md links to ../benchmarks/gone.md, which"),
    ],
)
def test_a_dead_link_fails_the_build(tmp_path, line, said):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(f"# Page\n\n{line}\n")
    settings = CONFIG.read_text(encoding="utf-8").partition("nav:\n  - Home")[0]
    settings = re.sub("docs_dir: .*", f"docs_dir: {tmp_path / 'docs'}", settings)
    settings = settings.replace("outside_pages.py", str(CONFIG.parent / "outside_pages.py"))
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
