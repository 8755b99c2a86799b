"""Small documents of every kind."""

from pathlib import Path

PARAGRAPH = (
    "The harbour of {place} is old. Ships came from far away, and their crews told of storms and quiet seas. "
    "Every spring the council counts the boats, and writes the number into a book that nobody reads. "
)


def prose(place: str, paragraphs: int = 12) -> str:
    """Some paragraphs about a place."""
    return "\n\n".join(f"{number}. {PARAGRAPH.format(place=place)}" for number in range(1, paragraphs + 1))


def write_docx(path: Path, text: str, cells: tuple[str, ...] = ()) -> None:
    """A Word file with paragraphs, then a table of one row."""
    import docx

    document = docx.Document()
    for paragraph in text.split("\n\n"):
        document.add_paragraph(paragraph)
    if cells:
        row = document.add_table(1, len(cells)).rows[0]
        for cell, content in zip(row.cells, cells, strict=True):
            cell.text = content
    document.save(str(path))


def write_pdf(path: Path, lines: list[str]) -> None:
    """A PDF of one page with these lines, written by hand: five objects and a table of where they are."""
    shown = " ".join(f"({line}) Tj 0 -14 Td" for line in lines)
    stream = f"BT /F1 11 Tf 40 780 Td {shown} ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R"
        " /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    start = len(data)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    data += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    data += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
    path.write_bytes(data)


def make_folder(root: Path) -> Path:
    """One document of each kind, in folders, beside files that are none."""
    (root / "letters").mkdir(parents=True)
    (root / "notes.txt").write_text(prose("Oslo"))
    (root / "letters" / "guide.md").write_text("# Guide\n\n" + prose("Lisbon"))
    body = "".join(f"<p>{paragraph}</p>" for paragraph in prose("Vienna").split("\n\n"))
    (root / "page.html").write_text(
        f"<html><head><title>No</title></head><body><script>no()</script>{body}</body></html>"
    )
    write_pdf(root / "paper.pdf", [f"Line {n} of the paper about the harbour of Dublin." for n in range(40)])
    write_docx(root / "contract.docx", prose("Madrid"), ("party", "The owner of the pier"))
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".hidden.txt").write_text(prose("Rome"))
    return root
