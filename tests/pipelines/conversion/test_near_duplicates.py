from collections import Counter
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from pipelines.conversion.near_duplicates import NearDuplicates, sketch
from pipelines.conversion.receipts import Receipt, Summary, receipt_of
from pipelines.conversion.run_files import FILE_RECEIPTS, RunFiles

WORDS = [f"word{number}" for number in range(5000)]


def text(seed: int, changed: int = 0) -> str:
    """400 words of a seed, of which so many are others."""
    random = Random(seed)
    words = random.sample(WORDS, 400)
    for place in random.sample(range(400), changed):
        words[place] = "other"
    return " ".join(words)


def receipt(name: str, content: str | None) -> Receipt:
    row = {"name": name, "source_bytes": 1, "read_at": 0.0}
    if content is None:
        return receipt_of(row, "rejected", "empty")
    return receipt_of(row, "converted", None, content_hash=f"{hash(content) & 2**64 - 1:064x}"[::-1], sketch=sketch(content))


def test_texts_that_share_most_of_their_words_meet() -> None:
    near = NearDuplicates()
    texts = [text(1), text(2), text(1, 4), text(3), text(3, 80), text(1, 2).upper(), text(2), "", "one", "One ", "two words"]
    near.add(receipt(str(place), each) for place, each in enumerate(texts))
    near.add([receipt("rejected", None)])
    groups = near.groups()
    assert groups.of.tolist() == [0, -1, 0, -1, -1, 0, -1, -1, 1, 1, -1, -1]
    assert groups.sizes == [3, 2] and groups.documents == 5
    assert NearDuplicates().groups().sizes == []


def test_recall_and_precision_are_what_the_bands_promise() -> None:
    """Of 300 pairs at a similarity of 0.97 and of 0.44."""
    near = NearDuplicates()
    for seed in range(300):
        near.add([receipt(f"{seed}", text(seed)), receipt(f"{seed}+", text(seed, 2)), receipt(f"{seed}-", text(seed, 60))])
    of = near.groups().of.reshape(300, 3)
    assert ((of[:, 0] == of[:, 1]) & (of[:, 0] >= 0)).sum() >= 297
    assert (of[:, 2] >= 0).sum() <= 3


def test_a_run_says_who_is_like_whom(tmp_path: Path) -> None:
    files, near = RunFiles(f"file://{tmp_path}/store", {}), NearDuplicates()
    alike = {0: text(1), FILE_RECEIPTS + 1: text(1, 2), 5: text(2), 7: text(2, 1), FILE_RECEIPTS + 3: text(2, 2)}
    told = [receipt(f"{place}", alike.get(place, f"alone {place}")) for place in range(FILE_RECEIPTS + 5)]
    for start in range(0, len(told), 100):
        files.add(told[start : start + 100])
        near.add(told[start : start + 100])
    found = files.write_near(near.groups())
    assert found == (5, 2, [(3, "5"), (2, "0")])
    rows = pq.read_table(Path(files.url, "near")).to_pylist()
    assert Counter((row["group"], row["name"]) for row in rows) == Counter(
        [(0, "5"), (0, "7"), (0, f"{FILE_RECEIPTS + 3}"), (1, "0"), (1, f"{FILE_RECEIPTS + 1}")]
    )
    summary = Summary(files.url, near=found)
    assert any("5 in 2 groups" in line for line in summary.lines()) and "  3 like 5" in summary.lines()
    assert "sketch" not in pq.read_schema(Path(files.url, "receipts", "000000.parquet")).names
