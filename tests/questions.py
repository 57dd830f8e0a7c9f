"""Documents and their sentences, for the tests of question writing."""

from core.text.documents import Document
from core.text.sentences import sentences


def document(text: str, title: str = "", name: str = "d", tenant: str = "t") -> Document:
    return Document(tenant=tenant, collection="c", name=name, text=text, title=title)


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]
