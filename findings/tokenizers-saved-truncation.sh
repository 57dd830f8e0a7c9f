#!/usr/bin/env bash
# Library:   transformers 5.23.0 with tokenizers 0.23.3
# Behaviour: A call of a tokenizer with truncation or padding leaves both settings in it, and save_pretrained writes
#            them into tokenizer.json. transformers resets them at each call and shows nothing; whoever opens the
#            file with tokenizers itself (a server in Rust, a tool that counts tokens) gets every text cut to the
#            length of that last call, and padded to it.
# Guess:     Truncation and padding belong to the call; what is saved is the tokenizer as it was loaded.
# Seen:      12 words, a tokenizer called once with max_length=4 and then saved: 4 ids by tokenizers, without an
#            error; 12 ids by transformers. One word: padded to 4. Saved before that call: 12 ids.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3

venv/bin/python - <<'EOF'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = [f"word{number}" for number in range(12)]
backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(["[PAD]", *words])}))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
text = " ".join(words)


def lengths(name):
    tokenizer.save_pretrained(name)
    plain = Tokenizer.from_file(f"{name}/tokenizer.json")
    return {
        "tokenizers": [len(plain.encode(some).ids) for some in (text, words[0])],
        "transformers": [len(PreTrainedTokenizerFast.from_pretrained(name)(some).input_ids) for some in (text, words[0])],
    }


seen = {"before": lengths("before")}
tokenizer(text, truncation=True, padding="max_length", max_length=4)
seen["after"] = lengths("after")
told = {
    "before": {"tokenizers": [12, 1], "transformers": [12, 1]},
    "after": {"tokenizers": [4, 4], "transformers": [12, 1]},
}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF
