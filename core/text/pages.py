"""A page of HTML or XHTML -> its title and text, as a browser shows them.

In: bytes. Out: headings, paragraphs, list items ("- ") and table cells (" | ") in a browser's lines; the model is `innerText`
of the HTML standard. Navigation, forms, scripts and what is hidden are left out. Texts that a browser sets apart by other means
than blanks stay apart: 10<sup>9</sup> becomes 10⁹, x<sup>n</sup> x^(n), a fraction of MathML (1)/(2). Raises `Refused` for what
is no page. Linear time but for nested <sup>, 1 MB of dense markup a second; foreign code (lexbor by selectolax), so it runs in a
parser's process.
"""

import codecs
import re
from collections.abc import Iterator
from html import escape
from typing import Any

from core.text.decoding import decode, one_line
from core.text.page_text import SMALL, PageText

META_BYTES = 1024
PROLOG_CHARACTERS = 4096
MAX_TITLES = 16

_META_CHARSET = re.compile(rb"<meta\s[^>]{0,512}?charset\s{0,16}=\s{0,16}[\"']?\s{0,16}([\w.:-]{1,40})", re.IGNORECASE)
_CHARSETS = re.compile(r"(ascii|big5|cp\d|euc_|gb|iso2022|iso8859|johab|koi8|kz1048|mac|ptcp154|shift_jis|tis|utf-(8|16|32))")

SKIPPED = frozenset({
    "annotation", "annotation-xml", "area", "audio", "canvas", "datalist", "defs", "desc", "embed", "head", "iframe", "metadata",
    "mphantom", "nav", "noembed", "noframes", "noscript", "object", "rp", "script", "select", "style", "template", "textarea",
    "title", "video",
})  # fmt: skip
PARAGRAPHS = frozenset({
    "article", "aside", "blockquote", "dir", "dl", "fieldset", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header",
    "hgroup", "hr", "listing", "main", "menu", "ol", "p", "plaintext", "pre", "section", "table", "ul", "xmp",
})  # fmt: skip
LINES = frozenset({
    "address", "caption", "center", "dd", "details", "div", "dt", "figcaption", "foreignObject", "foreignobject", "form",
    "legend", "mtr", "optgroup", "option", "search", "summary", "svg", "text",
})  # fmt: skip
BREAKS = dict.fromkeys(PARAGRAPHS, 2) | dict.fromkeys(LINES, 1)
PLAIN = frozenset({"a", "abbr", "b", "cite", "code", "em", "font", "i", "link", "script", "small", "span", "strong", "time", "u"})
"""The commonest of what has no border, to pass over soon."""
ITEMS, CELLS = frozenset({"li", "tr"}), frozenset({"td", "th"})
BRACKETS = {"rt": "(", "msqrt": "√("}
APART = frozenset({
    "audio", "button", "canvas", "del", "embed", "iframe", "img", "input", "mi", "mn", "mo", "ms", "mtd", "mtext", "object", "s",
    "select", "strike", "textarea", "tspan", "video",
})  # fmt: skip
"""What has a frame, a picture or a stroke between its text and the next one, and no blank."""
VERBATIM = frozenset({"listing", "plaintext", "pre", "xmp"})
VOID = frozenset({
    "area", "base", "basefont", "bgsound", "br", "col", "embed", "frame", "hr", "img", "input", "keygen", "link", "meta", "param",
    "source", "track", "wbr",
})  # fmt: skip
FORMULAS = {
    "mfrac": (("(", ")"), ("/(", ")")),
    "mroot": (("(", ")"), ("^(1/(", "))")),
    "msub": (("", ""), ("_(", ")")),
    "msup": (("", ""), ("^(", ")")),
    "msubsup": (("", ""), ("_(", ")"), ("^(", ")")),
    "munder": (("", ""), ("_(", ")")),
    "mover": (("", ""), ("^(", ")")),
    "munderover": (("", ""), ("_(", ")"), ("^(", ")")),
}
"""What stands before and after each part of a formula that is set above, below or beside another."""

_HIDDEN_STYLE = re.compile(r"(display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)
_XHTML = re.compile(r"\s*<\?xml\s|<!doctype[^>]{0,300}xhtml|<html[^>]{0,1000}xmlns\s{0,16}=", re.IGNORECASE)
_ATTRIBUTES = r"(?:[^>\"'/]|/(?!>)|\"[^\"]*\"|'[^']*')*+"
_OF_XML = re.compile(
    r"<!--.*?-->|<(?:script|style)\b" + _ATTRIBUTES + r">.*?</(?:script|style)\s*>|<!\[CDATA\[(?P<text>.*?)\]\]>"
    r"|<(?P<name>[a-z][\w:.-]*)" + _ATTRIBUTES + r"/>",
    re.IGNORECASE | re.DOTALL,
)
_EMPTY_RAW = re.compile(
    r"<(?P<name>script|style|title|textarea|iframe|noscript|noframes|noembed|xmp)\b" + _ATTRIBUTES + "/>", re.IGNORECASE
)


def html(data: bytes, max_characters: int) -> tuple[str, str]:
    """Title and text of a page. The title is that of its head, else its first <h1>.

    The encoding is the mark's, the page's own (`<meta charset>`, read as browsers do: Latin-1 means Windows-1252), or `decode`'s.
    """
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    source = _closed(decode(data, _declared(data)))
    try:
        tree = LexborHTMLParser(source)
    except SelectolaxError:
        raise MemoryError from None  # the one error that a parser of HTML can meet: any text is a page
    titles = (node.text().strip() for node in tree.css("title")[:MAX_TITLES] if not _in_picture(node))
    title = next(filter(None, titles), "")
    if not title and (heading := tree.css_first("h1")) is not None:
        title = _shown_text(heading, max_characters)
    return one_line(title), _shown_text(tree.body or tree.root, max_characters)


def _closed(source: str) -> str:
    """Source whose empty elements (`<script src="x"/>`) are closed, and whose CDATA is text, as in XML.

    HTML knows neither, and would read on to the end of the page. In what does not call itself XHTML only such empty elements are
    closed as would else hide text that a person meant to show: those that nothing closes.
    """
    if "/>" not in source and "<![CDATA[" not in source:
        return source
    if _XHTML.search(source[:PROLOG_CHARACTERS]):
        return _OF_XML.sub(_as_html, source)
    return _EMPTY_RAW.sub(_closed_unless_later, source)


def _as_html(found: re.Match[str]) -> str:
    if (text := found["text"]) is not None:
        return escape(text)
    name = found["name"]
    return found[0] if name is None or name.lower() in VOID else f"{found[0][:-2]}></{name}>"


def _closed_unless_later(found: re.Match[str]) -> str:
    name = found["name"]
    following = re.compile(rf"<(/?){name}\b", re.IGNORECASE).search(found.string, found.end())
    return found[0] if following is not None and following[1] else f"{found[0][:-2]}></{name}>"


def _declared(data: bytes) -> str:
    """The encoding that a page names for itself; "" where it names none or one that is no character set."""
    if not (match := _META_CHARSET.search(data[:META_BYTES])):
        return ""
    try:
        name = codecs.lookup(match[1].decode("ascii", "replace")).name
    except LookupError:
        return ""
    if not _CHARSETS.match(name):
        return ""
    return {"ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "utf-16": "utf-8"}.get(name, name)


def _in_picture(node: Any) -> bool:
    while (node := node.parent) is not None:
        if node.tag == "svg":
            return True
    return False


def _shown_text(root: Any, max_characters: int) -> str:
    """What an element shows."""
    page, outer, formulas = PageText(max_characters), [], 0
    for step, node in _walk(root):
        if step == "text":
            text = node.text_content or ""
            if not formulas or text.strip():
                page.words(text)
            continue
        if step == "verbatim":
            page.verbatim(node.text_content or "")
            continue
        tag, entered = node.tag, step == "in"
        if breaks := BREAKS.get(tag):
            page.border(breaks)
        elif tag in PLAIN:
            pass
        elif tag in ITEMS:
            _item(page, tag, entered)
        elif tag in CELLS:
            _cell(page, node, entered)
        elif tag == "br":
            if entered:
                page.line()
        elif tag in SMALL:
            if entered:
                outer.append(page)
                page = PageText(page.room)
            else:
                inner, page = page, outer.pop()
                page.small(tag, inner)
        elif tag in BRACKETS:
            page.mark(BRACKETS[tag] if entered else ")")
        elif tag in APART:
            page.apart()
            if tag == "tspan" and entered and {"x", "dy"} & node.attributes.keys():
                page.border(1)
        elif tag == "math":
            formulas += 1 if entered else -1
            if entered and (formula := _written(node)):
                page.words(formula)
            page.apart()
        if formulas and (signs := FORMULAS.get(node.parent.tag)) and (place := _place(node)) < len(signs):
            page.mark(signs[place][not entered])
    return str(page)


def _item(page: PageText, tag: str, entered: bool) -> None:
    if not entered:
        page.end()
    page.border(1)
    if entered:
        page.begin()
        if tag == "li":
            page.sign("- ")


def _cell(page: PageText, node: Any, entered: bool) -> None:
    if not entered:
        page.end_cell()
    elif _place(node):
        page.sign(" | ", inline=True)
    else:
        page.sign("")


def _place(node: Any) -> int:
    """How many elements stand before one in its parent, at most 3."""
    place = 0
    while place < 3 and (node := node.prev) is not None:
        place += node.is_element_node
    return place


def _written(formula: Any) -> str:
    """TeX of a MathML formula, where its page gives it; "" where it does not."""
    told = formula.attributes.get("alttext") or ""
    found = None if told else formula.css_first('annotation[encoding="application/x-tex"]')
    return told if found is None else found.text()


def _shows(node: Any) -> bool:
    """Whether a browser shows what stands inside of an element."""
    if node.tag in SKIPPED or (node.tag == "math" and _written(node)):
        return False
    attributes = node.attributes
    if not attributes:
        return True
    if "hidden" in attributes and attributes["hidden"] != "until-found":
        return False
    if "katex-html" in (attributes.get("class") or ""):  # the same formula once more, in pieces
        return False
    return not _HIDDEN_STYLE.search(attributes.get("style") or "")


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Elements as they are entered ("in") and left ("out"), and their texts ("text", in `pre` "verbatim"), in any depth."""
    stack: list[Any] = []
    verbatim = 0
    node = root
    while node is not None:
        if node.is_text_node:
            yield ("verbatim" if verbatim else "text"), node
        elif node.is_element_node:
            yield "in", node
            if (inner := node.child) is not None and _shows(node):
                stack.append(node)
                verbatim += node.tag in VERBATIM
                node = inner
                continue
            yield "out", node
        while stack and (after := node.next) is None:
            node = stack.pop()
            verbatim -= node.tag in VERBATIM
            yield "out", node
        node = after if stack else None
