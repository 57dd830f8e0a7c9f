"""Tiny PDF files, written by hand: what the parsers' tests read."""

import hashlib


def pdf(pages: list[str], title: str = "", encrypted: bool = False) -> bytes:
    """A PDF with a page for each text, a line of it a line of the page. encrypted: with a password that is not known."""
    kids = " ".join(f"{5 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
        f"<</Title{_string(title)}>>",
    ]
    for number, text in enumerate(pages):
        lines = "".join(f"{_string(line)}Tj T*" for line in text.splitlines())
        content = f"BT /F1 12 Tf 72 720 Td 14 TL {lines} ET" if lines else ""
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>/Contents {6 + 2 * number} 0 R>>"
        )
        objects.append(f"<</Length {len(content)}>>stream\n{content}\nendstream")
    trailer = f"/Size {len(objects) + 1}/Root 1 0 R/Info 4 0 R"
    if encrypted:
        owner, user = (hashlib.sha256(key).hexdigest() for key in (b"owner", b"user"))
        trailer += f"/ID[<00><00>]/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{owner}>/U<{user}>>>"
    return assembled(objects, trailer)


def assembled(objects: list[str], trailer: str) -> bytes:
    """A PDF of numbered objects, with the table that says where they lie."""
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    start = len(data)
    data += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<<{trailer}>>\n".encode()
    return data + f"startxref\n{start}\n%%EOF\n".encode()


def _string(text: str) -> str:
    return "(" + text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)") + ")"
