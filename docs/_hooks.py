"""Pages link to files outside docs/ for readers of the repository; the site names those files instead."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    docs = Path(config["docs_dir"]).resolve()
    readme = (docs.parent / "README.md").read_text(encoding="utf-8")
    markdown = re.sub(
        r"<!-- README: (.+) -->", lambda m: readme.partition(f"\n## {m[1]}\n")[2].partition("\n## ")[0], markdown
    )
    folder = (docs / page.file.src_uri).parent

    def kept(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(docs) and target.suffix in (".md", ".png"):
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: links to {match[2]}, which is not there")
        name = target.relative_to(docs.parent)
        words = match[1].strip("`")
        return f"`{name}`" if words in (str(name), match[2], target.name) else f"{match[1]} (`{name}`)"

    return LINK.sub(kept, markdown)
