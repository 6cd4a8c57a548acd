"""Reading the documents: their sections, and the command lines in them."""
import re
import shlex

from helpers import ROOT

PATHS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "weights" / "README.md"]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}


def fences(text: str) -> list[str | None]:
    """For each line of a document the language of the block it stands in, "" for none; None outside and for fences."""
    inside, languages = None, []
    for line in text.splitlines():
        is_fence = line.startswith("```")
        languages.append(None if is_fence else inside)
        if is_fence:
            inside = line[3:] if inside is None else None
    return languages


def section(text: str, heading: str) -> str:
    """From a heading to the next one."""
    lines = text.splitlines(keepends=True)
    titles = [i for i, (line, block) in enumerate(zip(lines, fences(text), strict=True))
              if block is None and re.match("#+ ", line)]
    start = next(i for i in titles if lines[i].lstrip("#").strip() == heading)
    end = next((i for i in titles if i > start), len(lines))
    return "".join(lines[start + 1:end])


def blocks(text: str, language: str = "") -> str:
    """What stands in a document between fences with a language; without one: commands, and what they print."""
    lines = zip(text.splitlines(keepends=True), fences(text), strict=True)
    return "".join(line for line, block in lines if block == language)


def command_lines(text: str) -> dict[str, list[str]]:
    """The command lines of Python programs in a document: each line, joined, and its words."""
    lines = [line.strip() for line in blocks(text).replace("\\\n", " ").splitlines()]
    programs = re.compile(r"(\w+=\S+ +)*(python|torchrun|routedvit) ")
    found = [shlex.split(line, comments=True) for line in lines if programs.match(line)]
    return {" ".join(words): words for words in found}
