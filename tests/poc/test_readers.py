"""Files to text, and one clear line for each that cannot be read."""

import builtins
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from poc_documents import prose, write_docx, write_pdf

from lserve.engine.errors import SettingsError
from lserve.poc import readers
from lserve.poc.readers import MAX_PARAGRAPH, MAX_WORD, read_documents, tidy


def read(*paths: Path) -> tuple[dict[str, str], list[str]]:
    """Texts by name, and what was said."""
    told: list[str] = []
    documents = read_documents([str(path) for path in paths], told.append)
    assert all("\n" not in line for line in told)
    return {document.name: document.text for document in documents}, told


def test_every_kind_of_document_is_read(folder: Path) -> None:
    texts, told = read(folder)
    assert list(texts) == ["contract.docx", "letters/guide.md", "notes.txt", "page.html", "paper.pdf"]
    for name, place in (("notes.txt", "Oslo"), ("letters/guide.md", "Lisbon"), ("page.html", "Vienna")):
        assert f"harbour of {place}" in texts[name]
    assert "Line 7 of the paper about the harbour of Dublin." in texts["paper.pdf"]
    assert "harbour of Madrid" in texts["contract.docx"] and "party | The owner of the pier" in texts["contract.docx"]
    assert "no()" not in texts["page.html"] and "\n\n" in texts["page.html"]
    assert told == ["passed over, other kinds of files: 1 .png"]


def test_files_and_folders_may_be_named_together(folder: Path) -> None:
    texts, _ = read(folder / "letters", folder / "notes.txt")
    assert list(texts) == ["guide.md", "notes.txt"]


def test_an_empty_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no document with text in .*; these kinds are read: \.txt"):
        read(tmp_path)
    with pytest.raises(SettingsError, match="there is no file or folder"):
        read(tmp_path / "nowhere")


def test_an_encrypted_pdf_is_left_out_and_the_rest_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "secret.pdf").write_bytes(encrypted_pdf())
    texts, told = read(folder)
    assert "secret.pdf: left out, it is encrypted and needs a password" in told
    assert len(texts) == 5


def test_damaged_and_empty_files_are_left_out(folder: Path) -> None:
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 and then nothing")
    (folder / "broken.docx").write_bytes(b"PK no archive")
    (folder / "short.txt").write_text("too short")
    (folder / "binary.txt").write_bytes(b"\0\1\2" * 100)
    write_pdf(folder / "scan.pdf", [])
    texts, told = read(folder)
    assert len(texts) == 5
    said = "\n".join(told)
    assert "broken.pdf: left out, it is damaged" in said
    assert "broken.docx: left out, it is damaged or encrypted" in said
    assert "short.txt: left out, it has 9 characters of text" in said
    assert "binary.txt: left out, it is not text" in said
    assert "scan.pdf: left out, its 1 pages hold no text (a scan?)" in said


def test_a_line_of_ten_megabytes_is_read_in_pieces(tmp_path: Path) -> None:
    sentence = "The council counts the boats every spring. "
    (tmp_path / "long.txt").write_text(sentence * (10_000_000 // len(sentence)))
    texts, told = read(tmp_path)
    assert told == ["long.txt: a line of 9,999,994 characters is read in pieces"]
    lines = texts["long.txt"].split("\n")
    assert max(map(len, lines)) <= MAX_PARAGRAPH and all(line.endswith("spring.") for line in lines)


def test_a_run_without_spaces_of_ten_megabytes_is_cut_out(tmp_path: Path) -> None:
    (tmp_path / "blob.txt").write_text(prose("Oslo") + "\n" + "x" * 10_000_000 + "\nThe end.")
    texts, told = read(tmp_path)
    assert told == ["blob.txt: 10,000,000 characters in 1 runs without a space are cut out"]
    assert texts["blob.txt"].endswith("The end.") and len(texts["blob.txt"]) < 10_000


def test_other_encodings(tmp_path: Path) -> None:
    text = "Zürich and Málaga. " + prose("Köln")
    (tmp_path / "old.txt").write_bytes(text.encode("cp1252"))
    (tmp_path / "wide.txt").write_bytes(text.encode("utf-16"))
    texts, _ = read(tmp_path)
    assert all(body.startswith("Zürich and Málaga.") for body in texts.values())


def test_a_file_that_is_too_large_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 1 << 20)
    (folder / "huge.txt").write_text("a b " * 600_000)
    texts, told = read(folder)
    assert "huge.txt" not in texts and "huge.txt: left out, 2 MB are more than 1" in told


def test_no_more_is_read_than_can_be_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 1_000)
    texts, told = read(folder)
    assert sum(map(len, texts.values())) == 1_000
    assert "letters/guide.md and what follows: left out, 1,000 characters are enough" in told


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_docx(name: str, *rest: Any) -> Any:
        if name == "docx":
            raise ImportError("No module named 'docx'", name="docx")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_docx)
    texts, told = read(folder)
    assert "contract.docx" not in texts
    assert "contract.docx: left out, reading it needs docx: pip install 'lserve[poc]'" in told


def test_word_files_keep_their_order(tmp_path: Path) -> None:
    write_docx(tmp_path / "a.docx", prose("Bern", 20))
    texts, _ = read(tmp_path)
    assert [line.split(".")[0] for line in texts["a.docx"].split("\n\n")] == [str(n) for n in range(1, 21)]


@given(st.text(max_size=400))
def test_tidy_text_has_no_control_characters_and_no_long_words(text: str) -> None:
    tidied = tidy(text, lambda told: None)
    assert "\n\n\n" not in tidied and "\x00" not in tidied and tidied == tidied.strip()
    assert max(map(len, tidied.split()), default=0) < MAX_WORD
    assert tidy(tidied, lambda told: None) == tidied


def encrypted_pdf() -> bytes:
    """One page, encrypted with a password (made by pypdf: RC4, user password `secret`)."""
    return (Path(__file__).parent / "encrypted.pdf").read_bytes()
