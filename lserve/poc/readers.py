"""Files to text: plain text, Markdown, HTML, PDF and Word, through the libraries of the extra `poc`.

What cannot be read is left out with a `Problem`, one line that says which file and why; the rest goes on.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lserve.engine.errors import LServeError, SettingsError

MAX_FILE_BYTES = 64 << 20
MAX_PDF_PAGES = 400
MAX_CHARACTERS = 16_000_000
"""Of all documents together: many times what a run can ask about."""

MIN_CHARACTERS = 200
MAX_WORD = 1_000
"""Characters without a space; longer runs (encoded pictures, minified code) are no language and are cut out."""

MAX_PARAGRAPH = 20_000
"""A longer line is broken at the ends of its sentences, or else of its words."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One document's text. name: its path from the folder that was given."""

    name: str
    kind: str
    text: str


class UnreadableError(LServeError):
    """A file that cannot be used; the message says why, in a few words."""


def read_documents(paths: Sequence[str], tell: Tell) -> list[SourceDocument]:
    """The documents of files and folders, in order of their names; tell gets one line per problem.

    Raises SettingsError when a path does not exist, or when nothing could be read.
    """
    documents: list[SourceDocument] = []
    passed_over: Counter[str] = Counter()
    left = MAX_CHARACTERS
    for path, name in _files(paths):
        kind = KINDS.get(path.suffix.lower())
        if kind is None:
            passed_over[path.suffix.lower() or "without a suffix"] += 1
            continue
        if left <= 0:
            tell(f"{name} and what follows: left out, {MAX_CHARACTERS:,} characters are enough")
            break
        try:
            text = read_file(path, lambda problem, name=name: tell(f"{name}: {problem}"))  # type: ignore[misc]
        except UnreadableError as error:
            tell(f"{name}: left out, {error.message}")
            continue
        documents.append(SourceDocument(name, kind, text[:left]))
        left -= len(text)
    if passed_over:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
        tell(f"passed over, other kinds of files: {kinds}")
    if not documents:
        kinds = ", ".join(KINDS)
        raise SettingsError(f"no document with text in {', '.join(paths)}; these kinds are read: {kinds}")
    return documents


def read_file(path: Path, tell: Tell) -> str:
    """A file's text, tidied. tell gets what was done to it. Raises UnreadableError."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableError(f"{size >> 20} MB are more than {MAX_FILE_BYTES >> 20}")
        text = tidy(_READERS[KINDS[path.suffix.lower()]](path, tell), tell)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None
    except ImportError as error:
        raise UnreadableError(f"reading it needs {error.name}: pip install 'lserve[poc]'") from None
    if len(text) < MIN_CHARACTERS:
        raise UnreadableError(f"it has {len(text)} characters of text")
    return text


def tidy(text: str, tell: Tell) -> str:
    """Text without control characters, runs of blanks, and lines or words that no prose has."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = re.sub(r"(?:\. ?){5,}", " ", text)  # the dots of a table of contents
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd]", "", text))
    kept, cut = re.subn(rf"\S{{{MAX_WORD},}}", "", text)
    if cut:
        tell(f"{len(text) - len(kept):,} characters in {cut} runs without a space are cut out")
    longest = max(map(len, kept.split("\n")), default=0)
    if longest > MAX_PARAGRAPH:
        tell(f"a line of {longest:,} characters is read in pieces")
        kept = "\n".join(piece for line in kept.split("\n") for piece in _pieces(line))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", kept)).strip()


def _pieces(line: str) -> Iterator[str]:
    """A line in pieces of at most MAX_PARAGRAPH characters."""
    while len(line) > MAX_PARAGRAPH:
        window = line[:MAX_PARAGRAPH]
        at = max(window.rfind(". "), window.rfind("? "), window.rfind("! ")) + 1 or window.rfind(" ") + 1
        yield line[:at]
        line = line[at:]
    yield line


def _files(paths: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Every file with the name to show, folders in order; hidden ones are passed over."""
    for given in paths:
        root = Path(given)
        if root.is_dir():
            for path in sorted(root.rglob("*")):
                inner = path.relative_to(root)
                if path.is_file() and not any(part.startswith(".") for part in inner.parts):
                    yield path, str(inner)
        elif root.is_file():
            yield root, root.name
        else:
            raise SettingsError(f"there is no file or folder {given!r}")


def _text(path: Path, tell: Tell) -> str:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data[:65536]:
        raise UnreadableError("it is not text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _html(path: Path, tell: Tell) -> str:
    from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning

    with warnings.catch_warnings(category=XMLParsedAsHTMLWarning, action="ignore"):  # XHTML reads well as HTML
        soup = BeautifulSoup(path.read_bytes(), "lxml")
    for tag in soup(["script", "style", "nav", "noscript", "template", "svg", "head"]):
        tag.decompose()
    for block in soup(["p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "section", "table"]):
        block.append("\n\n" if block.name in ("p", "section", "table") or block.name[0] == "h" else "\n")
    for line_break in soup("br"):
        line_break.replace_with("\n")
    return soup.get_text()


def _pdf(path: Path, tell: Tell) -> str:
    from pypdfium2 import PdfDocument, PdfiumError

    try:
        with PdfDocument(path) as document:
            count = len(document)
            if count > MAX_PDF_PAGES:
                tell(f"only the first {MAX_PDF_PAGES} of {count} pages are read")
            pages = [document[number].get_textpage().get_text_bounded() for number in range(min(count, MAX_PDF_PAGES))]
    except PdfiumError as error:
        if "assword" in str(error):
            raise UnreadableError("it is encrypted and needs a password") from None
        raise UnreadableError(f"it is damaged: {_one_line(error)}") from None
    text = "\n\n".join(pages)
    if len(text.strip()) < MIN_CHARACTERS:
        raise UnreadableError(f"its {count} pages hold no text (a scan?)")
    return re.sub(r"(\w)-\r?\n(\w)", r"\1\2", text)


def _docx(path: Path, tell: Tell) -> str:
    import zipfile

    from docx import Document
    from docx.opc.exceptions import PackageNotFoundError
    from docx.table import Table

    try:
        document = Document(str(path))
        blocks = []
        for block in document.iter_inner_content():
            if isinstance(block, Table):
                blocks += [" | ".join(cell.text for cell in row.cells) for row in block.rows]
            else:
                blocks.append(block.text)
    except (PackageNotFoundError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UnreadableError(f"it is damaged or encrypted: {_one_line(error)}") from None
    return "\n\n".join(blocks)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


_READERS: dict[str, Callable[[Path, Tell], str]] = {"text": _text, "HTML": _html, "PDF": _pdf, "Word": _docx}

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".html": "HTML",
    ".htm": "HTML",
    ".xhtml": "HTML",
    ".pdf": "PDF",
    ".docx": "Word",
}
"""Suffix to kind."""
