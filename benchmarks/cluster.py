"""What a second replica on a Ray cluster is worth: answers a second of one replica on one core, and of two on two.

    make kernels && python -m benchmarks.cluster

A replica runs the model on one thread, and is held to one core; Ray's proxy and the load, by the functions of
`service bench`, run where they can, on the same machine. In each round the service is deployed with one replica, loaded
and measured, then with two. The number of clients is the same for each replica.
"""

import os
import statistics
import time
from pathlib import Path

from benchmarks.command import STREET, add_output, facts, option_parser, write_json
from service import bench, cluster
from service.server import listen
from service.settings import Settings

CLIENTS = 4  # for each replica
WARM_SECONDS = 2.0


def replicas() -> list[int]:
    """The processes of the replicas of this process's own Ray cluster."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = []
    for process in parents:
        ancestor = process
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid() and b"ray::ServeReplica" in Path(f"/proc/{process}/cmdline").read_bytes():
            found.append(process)
    return sorted(found)


def pin(process: int, core: int) -> None:
    """Hold all threads of a process to one core; those to come inherit it."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def measure(settings: Settings, number: int, picture: bytes, seconds: float) -> bench.Level:
    """The load on so many replicas, each on a core of its own."""
    cluster.deploy(settings, cluster.Layout(min_replicas=number, max_replicas=number), print)
    while len(found := replicas()) != number:
        time.sleep(0.2)  # those of the round before are still ending
    for core, process in zip(sorted(os.sched_getaffinity(0)), found, strict=False):
        pin(process, core)
    target = bench.read_target(f"http://127.0.0.1:{settings.port}", {"format": "png"}, {}, 60)
    bench.measure(target, [picture], CLIENTS * number, WARM_SECONDS, lambda passed: None)
    level = bench.measure(target, [picture], CLIENTS * number, seconds, lambda passed: None)
    if set(level.statuses) != {200} or level.errors:
        raise SystemExit(f"{number} replicas answered {level.statuses}, without an answer: {dict(level.errors)}")
    return level


def main() -> None:
    parser = option_parser("cluster", __doc__)
    parser.add_argument(
        "--duration", type=float, default=20, metavar="SECONDS", help="of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times that each is measured (default: %(default)s)"
    )
    parser.add_argument("--image", type=Path, default=STREET, metavar="FILE", help="default: examples/street.jpg")
    add_output(parser, "cluster.json")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed to compare one with two")
    picture = options.image.read_bytes()
    with listen(Settings(port=0)) as listener:
        settings = Settings(port=listener.getsockname()[1], device="cpu", threads=1)
    rates: dict[int, list[float]] = {1: [], 2: []}
    p50s: dict[int, list[float]] = {1: [], 2: []}
    with cluster.connected(None):
        for turn in range(options.rounds):
            for number in rates:
                level = measure(settings, number, picture, options.duration)
                rates[number].append(level.rate)
                p50s[number].append(level.latency()["p50"])
                print(f"round {turn + 1}: {number} on {number}: {level.rate:.2f} answers/s", flush=True)
        cluster.stop(settings)
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    result = {
        **facts(f"python -m benchmarks.cluster --duration {options.duration:g} --rounds {options.rounds}"),
        "clients for each replica": CLIENTS,
        "replicas": {
            str(number): {
                "answers_per_second": [round(rate, 3) for rate in rates[number]],
                "p50_ms": [round(value, 1) for value in p50s[number]],
            }
            for number in rates
        },
        "two_to_one": [round(ratio, 3) for ratio in ratios],
        "two_to_one_median": round(statistics.median(ratios), 3),
    }
    print(f"two replicas on two cores: {result['two_to_one_median']} x one on one")
    write_json(options.output, result)


if __name__ == "__main__":
    main()
