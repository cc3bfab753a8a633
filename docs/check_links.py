"""Every link inside the built site leads to a file and an anchor that exist."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what points and what can be pointed to."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


def broken(root: Path) -> list[str]:
    """One line per link that leads nowhere."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf8")) for path in root.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target = target / "index.html"
            fragment = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{path.relative_to(root.resolve())}: {link} leads to no file")
            elif fragment and target in pages and fragment not in pages[target].anchors:
                found.append(f"{path.relative_to(root.resolve())}: {link} leads to no anchor")
    return found


if __name__ == "__main__":
    lines = broken(Path(sys.argv[1]))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.exit(bool(lines))
