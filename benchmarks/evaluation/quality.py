"""How well the shipped adapters answer: the quality bars on documents of the test split, which share no name with training.

Run from the root: `python -m benchmarks.evaluation.quality`; about 5 minutes on 2 cores. Writes benchmarks/results/quality.json,
and report and figure to assets/reference/evaluation.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.record import write_result
from core.adapters.base_model import load_base
from core.shine.hypernetwork import Hypernetwork
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.report import markdown, to_json, write_report
from pipelines.evaluation.report_writing import Bar
from pipelines.world.documents import WorldSpec, generate
from pipelines.world.reference import REFERENCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=500, help="of each level")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base = load_base(REFERENCE / "base")
    hypernetwork = Hypernetwork.load(REFERENCE / "hypernetwork", base)
    specs = [WorldSpec(seed=arguments.seed, split="test", level=level, count=arguments.documents) for level in (1, 2)]
    report = evaluate(base, hypernetwork, [document for spec in specs for document in generate(spec)])
    values = to_json(report)
    enough = Bar("unseen documents of each level", arguments.documents, ">=", 500)
    values["bars"].insert(0, enough.to_json())
    write_result("quality", values)
    write_report(report, REFERENCE / "evaluation")
    (REFERENCE / "evaluation" / "answers.jsonl").unlink()
    print(markdown(report))
    for bar in values["bars"]:
        print(f"{'pass' if bar['passed'] else 'MISS'}  {bar['name']}: {bar['value']:.3f} {bar['relation']} {bar['limit']}")


if __name__ == "__main__":
    main()
