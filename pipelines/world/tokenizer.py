"""The tokenizer of the reference base: byte-level BPE whose words are the words of the reference world.

Every value and every word of the world's texts is one token in the place where it stands (with its leading blank, or at the
start of a line), a name is two (" Bal", "mora"), any other text falls back to bytes and is decoded losslessly. The chat
template is ChatML, except that an answer follows "assistant" and a blank instead of a line feed: so " crimson" is the same
token in a document and as an answer.

Built, not trained: the vocabulary follows from the lexicon. Whole words are looked up before merges are tried (the BPE option
`ignore_merges`), so only names need merges. Cost: milliseconds.
"""

from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.world import lexicon
from pipelines.world.documents import finals, initials

PAD, START, END, RECONSTRUCT, COMPLETE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<RECON>", "<COMP>"
SPECIAL_TOKENS = (PAD, START, END, RECONSTRUCT, COMPLETE)

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- set opening = ' ' if message['role'] == 'assistant' else '\\n' %}
{{- '<|im_start|>' + message['role'] + opening + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{% endif %}"""

# Words that prompts around a document use; the world's own texts do not hold them.
_PROMPT_WORDS = "system user assistant Document document Text Question question Answer answer answers Context only short word"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template; `save_pretrained` writes all of it as JSON. No begin token, `<|im_end|>` ends."""
    vocabulary, merges = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, RECONSTRUCT, COMPLETE],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges that put names together.

    Order of merges: syllables of finals, then blank with onset, rimes, initials, finals. No syllable holds the two consonants
    that meet at the seam of a name, so no merge crosses it.
    """
    blank = _pieces(" ")[0]
    rimes = sorted({rime for group in lexicon.NAME_RIMES for rime in group})
    merges = [(pair[0], pair[1]) for pair in (*lexicon.FINAL_STARTS, *lexicon.FINAL_ENDS)]
    merges += [(blank, onset) for onset in lexicon.NAME_ONSETS]
    merges += [(rime[0], rime[1:]) for rime in rimes]
    merges += [(blank + initial[:1], initial[1:]) for initial in initials()]
    merges += [(final[:2], final[2:]) for final in finals()]
    words = sorted({piece for text in texts() for piece in _pieces(text)})
    tokens = dict.fromkeys((*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokens |= dict.fromkeys(left + right for left, right in merges)
    tokens |= dict.fromkeys(words)
    return {token: identifier for identifier, token in enumerate(tokens)}, merges


def texts() -> Iterator[str]:
    """Every text of the world without its names and values, each word in a place where it can stand; then the values."""
    for kind in lexicon.KINDS:
        for topic in kind.topics:
            statements = topic.statements + (topic.relations if isinstance(topic, lexicon.Link) else ())
            yield from (" " + _without_slots(text) for text in (*statements, *topic.phrases))
        yield from (f" {kind.singular} two three {kind.plural}, and", "-")
    yield from map(_without_slots, (*lexicon.FRAMES, *lexicon.TITLES, *lexicon.OPENINGS, *lexicon.SECOND_PARAGRAPHS))
    yield from (" " + text for text in lexicon.CONNECTIVES)
    yield from (f"{word} {word}" for word in _PROMPT_WORDS.split())
    yield from (f" {value}" for values in lexicon.VALUES.values() for value in values)


def _without_slots(template: str) -> str:
    return template.format(n="", s="", v="", p="", what="", names="")


def _pieces(text: str) -> list[str]:
    """What the pre-tokenizer makes of a text, in its byte alphabet; blanks that a removed slot left behind are dropped."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [piece for piece, _ in pieces if text == " " or piece.strip("\u0120")]
