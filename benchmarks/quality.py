"""How well the shipped adapters answer: the quality bars on documents of the test split, which share no name with training.

Run from the root: `python -m benchmarks.quality`; about 5 minutes on 2 cores. Writes benchmarks/results/quality.json, and report
and figure to assets/reference/evaluation.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.record import write_result
from core.base_model import load_base
from core.hypernetwork import Hypernetwork
from pipelines.evaluate import evaluate
from pipelines.evaluation_report import markdown, to_json, write_report
from pipelines.reference import REFERENCE
from pipelines.world import WorldSpec, generate


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
    write_result("quality", values)
    write_report(report, REFERENCE / "evaluation")
    (REFERENCE / "evaluation" / "answers.jsonl").unlink()
    print(markdown(report))
    for bar in values["bars"]:
        print(f"{'pass' if bar['passed'] else 'MISS'}  {bar['name']}: {bar['value']:.3f} {bar['relation']} {bar['limit']}")


if __name__ == "__main__":
    main()
