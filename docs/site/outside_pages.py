"""mkdocs hook: pages that lie outside docs/ in the repository (README, CHANGELOG, ...), and links to files."""

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s:]+)(#[^)\s]*)?(\))")


def sources() -> dict[str, str]:
    """Return the path in the site of each page outside docs/, by its path in the repository."""
    pages = {"README.md": "index.md"}
    pages |= {page: page for page in ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")}
    results = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    return pages | {f"benchmarks/results/{path.name}": f"benchmarks/results/{path.name}" for path in results}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for source, page in sources().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of the repository be links of the site, and those to files that are no page plain words.

    Raises `ValueError` for a link to what the repository does not have.
    """
    by_page = {there: source for source, there in sources().items()}
    here = by_page.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def mended(match: "re.Match[str]") -> str:
        before, target, anchor, after = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if not (ROOT / path).exists():
            raise ValueError(f"{here} links to {target}, which the repository does not have")
        if (ROOT / path / "README.md").is_file():
            path = f"{path}/README.md"
        there = sources().get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if there is None or files.get_file_from_path(there) is None:
            return f"{before.lstrip('!')[1:-2]} (`{path}`)"
        to = posixpath.relpath(there, PurePosixPath(page.file.src_uri).parent)
        return f"{before}{to}{anchor or ''}{after}"

    return LINK.sub(mended, markdown)
