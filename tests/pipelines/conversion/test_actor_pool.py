import os
import time
from pathlib import Path
from typing import Any

from pipelines.conversion.actor_pool import ActorPool

LASTING = {"max_restarts": -1, "max_task_retries": -1}


def test_results_come_in_order_from_as_many_actors_as_are_needed(ray_local: Any, tmp_path: Path) -> None:
    class Actor:
        def work(self, number: int) -> tuple[int, int]:
            if number == 0:  # until another actor has begun, so that one is needed
                while len(os.listdir(tmp_path)) < 2:
                    time.sleep(0.01)
            (tmp_path / str(os.getpid())).touch()
            return number, os.getpid()

    start = ray_local.remote(num_cpus=0, **LASTING)(Actor).remote
    pool = ActorPool(start, lambda actor, each: actor.work.remote(each), least=1, most=2)
    assert pool.started_at is None
    (tmp_path / "begun").touch()
    results = list(pool.results(ray_local.put(number) for number in range(7)))
    assert pool.started_at is not None and [number for number, _ in results] == list(range(7))
    assert len({pid for _, pid in results}) == 2
    pool.close()


def test_a_dead_actor_is_started_again_with_its_arguments_and_its_object(ray_local: Any, tmp_path: Path, capfd: Any) -> None:
    class Actor:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def work(self, number: int) -> int:
            if number == 2 and not (self.folder / "died").exists():
                (self.folder / "died").touch()
                os._exit(1)
            return number

    actor = ray_local.remote(num_cpus=0, **LASTING)(Actor)
    pool = ActorPool(lambda: actor.remote(tmp_path), lambda actor, each: actor.work.remote(each), least=1, most=1)
    assert list(pool.results(ray_local.put(number) for number in range(4))) == [0, 1, 2, 3]
    pool.close()
    assert (tmp_path / "died").exists() and "object store" not in capfd.readouterr().err
