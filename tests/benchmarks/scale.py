"""How far it scales: thousands of callers, up to a thousand replicas and the autoscaler, on a simulated clock.

usage: ./dev bench scale [--replicas 10 100 1000] [--callers 10000] [--seconds 10] [--busy 0.8] [--service SECONDS]

The simulation runs the client's own rooms (which replica, retry, breaker) and the server's own autoscaling policy; service
times are those of a real server on this machine, measured first, unless --service gives one. Prints balance, latency and
Locate's traffic beside what picking at random or the least loaded as last seen would give; then a day, a flash crowd and a
steady day under the autoscaler. Throughput of real replicas on a machine with 16 cores is not part of this program.
"""

import argparse
import random
import time

from scale_rooms.crowd import Settings, simulated
from scale_rooms.measured import measured
from scale_rooms.scaling import CURVES, Rule, scaled

ROWS = 8
"""Of a measured call: one layer of 8 KV heads."""
STRATEGIES = ("two choices", "random", "least loaded")


def balance(given: argparse.Namespace, times: list[float], size: int) -> None:
    """The table of fleets and strategies."""
    mean = sum(times) / len(times)
    print(
        f"\n{given.callers} callers, fleets {given.busy:.0%} busy, {given.seconds:g} s, a call takes {mean * 1e3:.1f} ms alone"
    )
    print(
        f"{'replicas':>8} {'strategy':<14} {'calls':>8} {'failed':>6} {'p50':>8} {'p99':>9} {'busiest':>8} {'refused':>8} {'Locate/s':>9} {'MiB/s':>7}"
    )
    for replicas in given.replicas:
        for strategy in STRATEGIES:
            started = time.monotonic()
            found = simulated(
                Settings(replicas, given.callers, times, size, given.busy, strategy, seconds=given.seconds, seed=given.seed)
            )
            counted = given.seconds * 4 / 5
            print(
                f"{replicas:>8} {strategy:<14} {found.calls:>8} {found.failed:>6} {found.quantile(0.5) * 1e3:>5.1f} ms "
                f"{found.quantile(0.99) * 1e3:>6.1f} ms {found.imbalance:>7.2f}x {found.refused:>8} {found.locates / counted:>9.0f} "
                f"{found.locate_bytes / counted / 2**20:>7.2f}   ({time.monotonic() - started:.0f} s)",
                flush=True,
            )


def loss(given: argparse.Namespace, times: list[float], size: int) -> None:
    """A twentieth of the replicas dies at once."""
    print("\nA twentieth of the replicas (at least one) dies at once; the directory notices after 2 s:")
    for replicas in given.replicas:
        settings = Settings(
            replicas,
            given.callers,
            times,
            size,
            given.busy,
            seconds=given.seconds,
            killed=max(0.05, 1 / replicas),
            seed=given.seed,
        )
        found = simulated(settings)
        again = found.attempts - found.calls
        print(
            f"{replicas:>8} replicas: {found.calls} calls, {found.failed} failed, {again} sent again, p99 {found.quantile(0.99) * 1e3:.1f} ms"
        )


def autoscaler(given: argparse.Namespace, times: list[float], size: int) -> None:
    """The table of curves, under the default targets and under one that is made for these calls."""
    mean = sum(times) / len(times)
    peak = 40 / mean
    rules = {
        "default targets": Rule(least=1, most=1000),
        "two calls a replica": Rule(least=1, most=1000, target_rows=2.0 * ROWS),
    }
    print(
        f"\nThe autoscaler: peak {peak:.0f} calls/s of {ROWS} rows (40 replicas' work), a replica starts in {given.start:g} s, "
        "room 1 GiB each:"
    )
    print(
        f"{'target':<20} {'curve':<14} {'replicas':>10} {'changes':>8} {'turns':>6} {'refused':>8} {'longest wait':>13} "
        f"{'behind for':>11} {'hours':>7}"
    )
    for name, rule in rules.items():
        for curve in CURVES:
            found = scaled(curve, rule, peak=peak, per_call=mean, size=size, room_bytes=2**30, rows=ROWS, start=given.start)
            print(
                f"{name:<20} {curve:<14} {found.least:>4} - {found.most:<4} {found.changes:>7} {found.turns:>6} "
                f"{found.refused_ratio:>8.2%} {found.longest_wait:>11.1f} s {found.recovered:>9.0f} s {found.hours_ratio:>6.2f}x"
            )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--callers", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of simulated time")
    parser.add_argument("--busy", type=float, default=0.8, help="share of the fleet's time that callers ask for")
    parser.add_argument("--service", type=float, help="seconds of a call, exponentially distributed, instead of measured ones")
    parser.add_argument("--calls", type=int, default=80, help="calls that are measured")
    parser.add_argument("--start", type=float, default=20.0, help="seconds until a new replica serves")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.service is None:
        times, size, where = measured(given.calls)
        ordered = sorted(times)
        print(
            f"measured: {len(times)} calls ({where}), {ordered[0] * 1e3:.1f} to {ordered[-1] * 1e3:.1f} ms, {size / 2**20:.1f} MiB each"
        )
    else:
        chance = random.Random(given.seed)
        times, size = [chance.expovariate(1 / given.service) for _ in range(10_000)], 4 * 2**20
    balance(given, times, size)
    loss(given, times, size)
    autoscaler(given, times, size)


if __name__ == "__main__":
    main()
