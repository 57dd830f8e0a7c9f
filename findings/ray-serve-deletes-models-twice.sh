#!/usr/bin/env bash
# Library:   ray 2.60.0, Ray Serve
# Behaviour: When serve.multiplexed evicts a model it calls the model's __del__ as a plain function, and Python calls
#            it again when the object goes: each evicted model's __del__ runs twice. A model that gives back memory,
#            a slot or a reference count there gives it back twice - the second time perhaps somebody else's.
# Guess:     Serve drops its reference and Python calls __del__, once.
# Seen:      Room for one model, requests for a, b, a: the log of the replica is open a, del a, del a, open b, del b,
#            del b, open a.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" && unset PYTHONPATH
"${PYTHON:-python3.11}" -m venv venv
venv/bin/pip install -qq --no-compile --disable-pip-version-check 'ray[serve]==2.60.0'

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled RAY_worker_niceness=0
venv/bin/python - <<'EOF'
import os
import sys

import ray
from ray import serve

options = dict(include_dashboard=False, log_to_driver=False, logging_level="CRITICAL", object_store_memory=100 * 2**20)
ray.init(address="local", num_cpus=2, _temp_dir=f"{os.getcwd()}/ray", **options)


class Model:
    def __init__(self, name, log):
        self.name, self.log = name, log
        log.append(f"open {name}")

    def __del__(self):
        self.log.append(f"del {self.name}")


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Replica:
    def __init__(self):
        self.log = []

    @serve.multiplexed(max_num_models_per_replica=1)
    async def load(self, name):
        return Model(name, self.log)

    async def __call__(self):
        await self.load(serve.get_multiplexed_model_id())
        return list(self.log)


serve.start(proxy_location="Disabled")
handle = serve.run(Replica.bind(), route_prefix=None)
for name in "aba":
    seen = handle.options(multiplexed_model_id=name).remote().result()
serve.shutdown()
ray.shutdown()
told = ["open a", "del a", "del a", "open b", "del b", "del b", "open a"]
print("as told" if seen == told else "CHANGED", seen)
sys.stdout.flush()
sys.exit(seen != told)
EOF
