"""README.md from nbs/index.ipynb; with --check, only say whether it is up to date."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook, not this file. -->\n\n"


def rewrite(link: re.Match) -> str:
    "A link that is right in nbs/ becomes one that is right in the project's folder."
    label, target = link[1], link[2]
    if re.match(r"[a-z]+:|#", target):
        return link[0]
    moved = target[3:] if target.startswith("../") else f"nbs/{target}"
    if not (ROOT / moved.split("#")[0]).exists():
        raise SystemExit(f"README: expected {moved} to exist, got a dead link in nbs/index.ipynb")
    return f"{label}({moved})"


def readme() -> str:
    "The text of README.md."
    config = Config()
    config.TagRemovePreprocessor.remove_input_tags = {"hide-input"}
    config.TagRemovePreprocessor.remove_cell_tags = {"hide"}
    exporter = MarkdownExporter(config=config)
    exporter.register_preprocessor(TagRemovePreprocessor(config=config), enabled=True)
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it
    text, _ = exporter.from_notebook_node(notebook)
    text = re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", rewrite, text)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M))
    return HEAD + text.strip() + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--check" not in sys.argv:
        path.write_text(readme(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != readme():
        sys.exit("README.md: expected what nbs/index.ipynb says, got another. Try: make readme")
