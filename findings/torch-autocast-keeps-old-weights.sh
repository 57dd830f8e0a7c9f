#!/usr/bin/env bash
# Library:   torch 2.13.0
# Behaviour: Inside one torch.autocast region every weight is cast once and the cast copy is kept until the outermost
#            region ends. An optimiser step or load_state_dict in the region changes the weight, but not the copy:
#            the model goes on answering with its first weights, and says nothing. A region of its own around each
#            forward does not help inside an outer one.
# Guess:     The copy is made anew when the weight has changed; torch counts the versions of a tensor for autograd
#            anyway.
# Seen:      Four steps of SGD in one region: four times the same loss. A region for each step: it falls. A region
#            for each step in an outer one: the same loss again. After load_state_dict of zeros in the region: the
#            old outputs, not zeros.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6

venv/bin/python - <<'EOF'
import sys
from contextlib import nullcontext

import torch


def region(wanted=True, **options):
    return torch.autocast("cpu", torch.bfloat16, **options) if wanted else nullcontext()


def steps(outer, inner, **options):
    """The losses of four steps of training a linear."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(8, 1), torch.randn(32, 8)
    optimiser, losses = torch.optim.SGD(linear.parameters(), 0.1), []
    with region(outer, **options):
        for _ in range(4):
            with region(inner, **options):
                loss = (linear(x).float() - x.sum(1, keepdim=True)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses


def falls(losses):
    return losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2


def after_load():
    linear, x = torch.nn.Linear(8, 1), torch.randn(32, 8)
    with region():
        before = linear(x)
        linear.load_state_dict({name: torch.zeros_like(value) for name, value in linear.state_dict().items()})
        return torch.equal(linear(x), before), bool((linear(x) != 0).any())


seen = {
    "one region": len(set(steps(outer=True, inner=False))),
    "a region each": falls(steps(outer=False, inner=True)),
    "both": len(set(steps(outer=True, inner=True))),
    "one region, cache_enabled=False": falls(steps(outer=True, inner=False, cache_enabled=False)),
    "old outputs after load_state_dict": after_load(),
}
told = {
    "one region": 1,
    "a region each": True,
    "both": 1,
    "one region, cache_enabled=False": True,
    "old outputs after load_state_dict": (True, True),
}
print("as told" if seen == told else "CHANGED", seen)
sys.exit(seen != told)
EOF
