"""Time a call of the built-in UNet with threads that spin and with threads that sleep.

torch's threads meet at the end of every operation. By default one that is early spins in a busy
loop; with OMP_WAIT_POLICY=passive it sleeps. Beside another busy process a spinning thread takes
the core that the late one needs.

    python benchmarks/busy_machine.py --calls 20 --rounds 5

Each measurement is a process of its own, and the settings take turns. Printed are milliseconds a
call: the median of all calls, and the fastest one, which says what a call takes undisturbed even
where somebody else uses the machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = {
    "torch's default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def time_calls(calls: int) -> list[float]:
    """Return the seconds of each call of the built-in UNet on eight pictures, in this process."""
    import torch

    from msfp_cli.commands.console import quiet_libraries
    from msfp_cli.pipelines.loading import BUILT_IN, ModelSource, load_pipeline

    quiet_libraries()
    unet = load_pipeline(ModelSource(model=BUILT_IN), "cpu").unet
    generator = torch.Generator().manual_seed(0)
    size = unet.config.sample_size
    sample = torch.randn(8, unet.config.in_channels, size, size, generator=generator)
    text = torch.randn(8, 16, unet.config.cross_attention_dim, generator=generator)
    seconds = []
    with torch.no_grad():
        for _ in range(3 + calls):  # three to warm up
            start = time.perf_counter()
            unet(sample, 500, encoder_hidden_states=text)
            seconds.append(time.perf_counter() - start)
    return seconds[3:]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep so many processes busy while the context is open."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(setting: str, num_busy: int, arguments: argparse.Namespace) -> list[float]:
    """Time calls in a fresh process with a setting, beside so many busy processes."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": str(arguments.threads), **SETTINGS[setting]}
    command = [sys.executable, __file__, "--here", "--calls", str(arguments.calls)]
    with busy_processes(num_busy):
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [float(seconds) for seconds in done.stdout.split()]


def figures(seconds: list[float]) -> tuple[str, str]:
    """Return the median and the smallest in milliseconds."""
    return f"{statistics.median(seconds) * 1000:.1f}", f"{min(seconds) * 1000:.1f}"


def main() -> None:
    """Measure every setting alone and beside one busy process, in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=20, help="calls in each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="time in this process and print it")
    arguments = parser.parse_args()
    if arguments.here:
        print(*time_calls(arguments.calls))
        return
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for setting in SETTINGS:
            for num_busy in (0, 1):
                measured = measure(setting, num_busy, arguments)
                seconds.setdefault((setting, num_busy), []).extend(measured)
    print("| setting | alone, median | fastest | beside a busy process, median | fastest |")
    print("|---|---|---|---|---|")
    for setting in SETTINGS:
        cells = [*figures(seconds[setting, 0]), *figures(seconds[setting, 1])]
        print(f"| {setting} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
