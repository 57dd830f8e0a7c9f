"""Pages read as a browser shows them; `innerText` of the HTML standard is the model."""

import random
import unicodedata
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.text.pages import html

XHTML = '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml">'


def shown(page: str) -> str:
    return html(page.encode(), 1_000_000)[1]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("10<sup>9</sup> m", "10⁹ m"),
        ("10<sup>9</sup>5", "10⁹5"),
        ("10<sup><a href=x>-9</a></sup>", "10⁻⁹"),
        ("2<sup>2<sup>n</sup></sup>", "2^(2^(n))"),
        ("x<sup>n+1</sup>y", "x^(n+1)y"),
        ("H<sub>2</sub>O, x<sub>max</sub>", "H₂O, x_(max)"),
        ("the 1<sup>st</sup> of May", "the 1st of May"),
        ("a claim<sup>[1]</sup> and<sup>*</sup>", "a claim[1] and*"),
        ("<sup>a</sup>See the note", "a See the note"),
        ("see <sup>note</sup>", "see note"),
        ("a<sup> </sup>b<sup></sup>c", "a bc"),
        ("a<img src=x>b <img src=y>c", "a b c"),
        ("<del>10</del><ins>20</ins> <s>9</s>5", "10 20 9 5"),
        ("<button>Yes</button><button>No</button>", "Yes No"),
        ("漢字<ruby>明日<rp>(</rp><rt>Ashita</rt><rp>)</rp></ruby>", "漢字明日(Ashita)"),
        ("four <i>f</i>ive, sou<wbr>nd", "four five, sound"),
        ("1<span style='display: none'>0001</span>2", "12"),
        ("a<br>b<br><br>c<hr>d", "a\nb\n\nc\n\nd"),
        ("&lt;p&gt; &amp;amp; &eacute; 5&nbsp;m &#150;", "<p> &amp; é 5 m \u2013"),
        ("<details><summary>More</summary>Inner</details><center>c</center>d", "More\nInner\nc\nd"),
        ("<svg><title>icon</title><style>x{}</style><text>Two</text><text>words</text></svg>", "Two\nwords"),
    ],
)  # fmt: skip
def test_words_and_numbers_stay_apart(page: str, text: str) -> None:
    assert shown(page) == text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<table>\n<tr>\n<td>1</td>\n<td>2</td>\n</tr>\n<tr><th>3<td>4</table>", "1 | 2\n3 | 4"),
        ("<table><tr><td><p>1</p></td><td><p>2</p><p>3</p></td></tr><tr><td><p>4</table>", "1 | 2\n\n3\n4"),
        ("<table><tr><td>1<td><td>3<td></tr><tr><td><td></tr><tr><td><td>4</table>", "1 |  | 3\n | 4"),
        ("<table><tr><td>1<td><table><tr><td><tr><td>2<td>3</table>4<td>5</table>6", "1 | 2 | 3\n\n4 | 5\n\n6"),
        ("<ul><li><p>a</p><p>b</p><li><li>c<ol><li>d</ol></ul>e", "- a\n\nb\n\n- c\n\n- d\n\ne"),
        ("<ul><li><ul><li>a</ul></ul>", "- - a"),
        ("<dl><dt>a<dd>b</dl>", "a\nb"),
        ("<pre>a\n  b<br><b>c</b>  d\n</pre>e", "a\n  b\nc  d\n\n\ne"),
    ],
)
def test_tables_and_lists_keep_their_shape(page: str, text: str) -> None:
    assert shown(page) == text


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        ("<msup><mi>x</mi><mn>2</mn></msup><mo>+</mo><msub>\n<mi>a</mi>\n<mn>1</mn>\n</msub>", "x^(2)+a_(1)"),
        ("<mfrac><mn>1</mn><mn>2</mn></mfrac>", "(1)/(2)"),
        ("<mi>x</mi><mn>2</mn>", "x 2"),
        ("<msqrt><mn>2</mn></msqrt>", "√(2)"),
        ("<mroot><mn>2</mn><mn>3</mn></mroot>", "(2)^(1/(3))"),
        ('<semantics><mn>1</mn><annotation encoding="application/x-tex">x^{2}</annotation></semantics>', "x^{2}"),
    ],
)
def test_formulas_keep_what_stands_above_and_below(formula: str, text: str) -> None:
    assert shown(f"Let <math>{formula}</math>.") == f"Let {text}."


@pytest.mark.parametrize(
    "page",
    [
        XHTML + '<head><title/><script src="x" /></head><body><p>Shown</p></body></html>',
        XHTML + '<body><iframe src="/>"/><nav/><p class=\'a"b\'/><p>Shown</p></body></html>',
        XHTML + "<body><script>//<![CDATA[\nif (a<b) c = '<title/>'\n//]]></script><p><![CDATA[Shown]]></p></body></html>",
        XHTML + "<body><!-- <script/> --><svg><path d='x'/></svg><br/>Shown</body></html>",
        "<script src=x /><p>Shown",
        "<title/><p>Shown<svg><title>x</title></svg>",
        '<script src="a.js"/></script><p>Shown',
        "<script>write('<script src=\"x\"/>')</script><p>Shown",
    ],
)
def test_an_empty_element_hides_nothing(page: str) -> None:
    assert shown(page) == "Shown"


def test_cdata_of_xhtml_is_text() -> None:
    assert shown(XHTML + "<p>a <![CDATA[<b> & c]]></p></html>") == "a <b> & c"


@pytest.mark.parametrize(
    ("page", "title"),
    [
        ("<svg><title>icon</title></svg><h1>One<br>two</h1>", "One two"),
        ("<title> </title><h1>10<sup>9</sup></h1>", "10⁹"),
        ("<title>Title</title><h1>Heading</h1>", "Title"),
    ],
)
def test_the_title_is_the_heads_or_the_headings(page: str, title: str) -> None:
    assert html(page.encode(), 1000)[0] == title


class Element(NamedTuple):
    tag: str
    inner: "list[Element | str]"

    def source(self) -> str:
        return f"<{self.tag}>{''.join(each if isinstance(each, str) else each.source() for each in self.inner)}</{self.tag}>"

    def inner_text(self) -> str:
        """As the standard says it, with single blanks for lines and tabs: words are compared, not lines."""
        text = "".join(each if isinstance(each, str) else each.inner_text() for each in self.inner)
        return text if self.tag in INLINE else f" {text} "


INLINE = ("b", "code", "em", "i", "small", "span", "u")
HELD = {
    "inline": [*INLINE, "words", "words"],
    "block": ["div", "section", "blockquote", "p", "h2", "pre", "table", "ul", "ol", *INLINE, "words"],
    "table": ["tr", "blank"],
    "tr": ["td", "th", "blank"],
    "li": ["p", "ul", *INLINE, "words"],
}
HOLDS = {"div": "block", "section": "block", "blockquote": "block", "td": "block", "th": "block", "table": "table", "tr": "tr"}


def drawn(draw: random.Random, tag: str, depth: int) -> Element:
    """An element that HTML's parser builds just so, at random."""
    inner: list[Element | str] = []
    for _ in range(draw.randint(0, 4 if depth else 0)):
        held = draw.choice(["li"] if tag in ("ul", "ol") else HELD[tag if tag == "li" else HOLDS.get(tag, "inline")])
        if held in ("words", "blank"):
            inner.append("".join(draw.choices("abc12 \n" if held == "words" else " \n", k=draw.randint(0, 6))))
        else:
            inner.append(drawn(draw, held, depth - 1))
    return Element(tag, inner)


@settings(max_examples=400)
@given(st.integers(0, 2**40))
def test_words_are_those_of_a_browser(seed: int) -> None:
    page = drawn(random.Random(seed), "div", 6)
    found = shown(page.source()).replace("|", " ").replace("- ", " ")
    assert found.split() == page.inner_text().split(), page.source()


@given(st.lists(st.tuples(st.sampled_from(["sup", "sub"]), st.text("0123456789+-ab ", max_size=4), st.text("xy7 ", max_size=3))))
def test_no_raised_text_is_lost(pieces: list[tuple[str, str, str]]) -> None:
    found = shown("n" + "".join(f"<{tag}>{small}</{tag}>{plain}" for tag, small, plain in pieces))
    every = "n" + "".join(small + plain for _, small, plain in pieces)
    kept = unicodedata.normalize("NFKC", found).replace("\u2212", "-")
    assert [c for c in kept if c.isalnum() or c in "+-"] == [c for c in every if c.isalnum() or c in "+-"]
