"""One HTML file that stands alone: no network, no other files."""
import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "page_files"
# One program: each file may use what those before it define.
_PROGRAM = ("attention.js", "drawing.js", "panel.js", "link.js", "input.js", "adding.js", "start.js")


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _as_json(value: Any) -> str:
    """JSON inside of a script element, which only `<` could end."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


def make_page(network: str, photos: list[dict[str, Any]], is_served: bool = False) -> str:
    """The page of photographs as `Looker.look` gives them.

    Args:
        network: Its name.
        photos: The photographs.
        is_served: Whether a server is behind the page, which takes more of them.
    """
    # In one pass over the template: what is put in is not searched for marks.
    parts = {
        "/*STYLE*/": _read("style.css"),
        "/*DATA*/": _as_json(dict(network=network, served=is_served, photos=photos)),
        "/*PROGRAM*/": "\n".join(map(_read, _PROGRAM)),
    }
    return "\n".join(parts.get(line.strip(), line) for line in _read("page.html").splitlines()) + "\n"
