"""What mkdocs.yml needs beside plugins: files outside docs/, links to them, and the commands' help.

Links in documents are those of the repository, so that they work in any viewer of it. A link to a
file that is no page of the site becomes its text, because the site has no copy of the sources. But
a line that is nothing but a link to a Python file shows the file.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Pages from outside docs/, by their place in the site.
ADDED = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "examples/deeplight.md": "examples/deeplight/README.md",
    "examples/transformer_xl.md": "examples/transformer_xl/README.md",
    "examples/wide_resnet.md": "examples/wide_resnet/README.md",
}
COMMANDS = "<!-- the help of all commands -->"
WIDTH = "92"  # of the help, in columns

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_SCRIPT = re.compile(r"^\[[^\[\]]*\]\(([^()\s]+\.py)\)$", re.MULTILINE)
_IMAGE = re.compile(r"(!\[[^\]]*\]\()([^()\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for target, source in ADDED.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of the repository be links of the site, and put the commands' help in."""
    place = page.file.src_uri
    origin = ADDED.get(place, f"docs/{place}")
    pages = {ADDED.get(file.src_uri, f"docs/{file.src_uri}"): file.src_uri for file in files}

    def target(link: str) -> str | None:
        """The link in the site; None where the repository has the file, and the site has not."""
        path, mark, anchor = link.partition("#")
        if not path or "://" in link or link.startswith("mailto:"):
            return link
        found = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        found = f"{found}/README.md" if f"{found}/README.md" in pages else found
        if found in pages:
            start = posixpath.dirname(place) or "."
            return posixpath.relpath(pages[found], start) + mark + anchor
        return None if (ROOT / found).exists() else link  # a wrong one is left for mkdocs to find

    def linked(match: re.Match[str]) -> str:
        own = target(match[2])
        return match[1] if own is None else f"[{match[1]}]({own})"

    def shown(match: re.Match[str]) -> str:
        return f"{match[1]}{target(match[2]) or match[2]}{match[3]}"

    def listed(match: re.Match[str]) -> str:
        source = ROOT / posixpath.dirname(origin) / match[1]
        return f"{match[0]}\n\n```python\n{source.read_text()}```"

    markdown = _SCRIPT.sub(listed, markdown)
    markdown = _IMAGE.sub(shown, _LINK.sub(linked, markdown))
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def commands() -> str:
    """A section for each command of gq-horovod, with its help."""
    from gq_horovod.cli import parser

    os.environ["COLUMNS"] = WIDTH
    (choices,) = (
        action.choices
        for action in parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return "\n".join(
        f"## gq-horovod {name}\n\n```text\n{command.format_help()}```\n"
        for name, command in choices.items()
    )
