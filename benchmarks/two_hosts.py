"""Two hosts share a calibration and a fine-tuning; compared with one process, and with a host lost.

    python benchmarks/two_hosts.py --work DIR [--size tiny|fashion] [--processes 1]
        [--markdown FILE]

The hosts are two network namespaces of this machine with a cable (veth) between them, names of
their own, and a file system that both see. `accelerate launch` is started on each, as on two
machines; its option `--multi_gpu` makes it use torch's launcher, on CPUs, too. Where namespaces are
not allowed, the hosts are two loopback addresses. The calibration is run three times: by one
process; by both hosts; and by both hosts of which the second is killed on its way, after which the
same command goes on. Then one process and both hosts fine-tune for some updates. Each process has
one thread, so that sums are made in one order. `--size tiny` takes a small random UNet, `fashion`
the built-in pipeline. Linux only.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from page import put

from msfp_cli.finetuning.result import FinetuneState
from msfp_cli.run import Run

TESTS = Path(__file__).parents[1] / "tests"
PRIVATE = "MSFP_PRIVATE"  # set in namespaces that end with this script
PORT = 29517
UPDATES = 8
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))


@dataclass(frozen=True)
class Host:
    """A machine, as far as the processes on it can tell.

    Arguments:
        name: its name.
        address: that others reach it by.
        interface: of that address.
        prefix: words before a command that is run there.
    """

    name: str
    address: str
    interface: str
    prefix: tuple[str, ...] = ()


def enter_private_namespaces() -> None:
    """Run this script again where it may make hosts, if it may do that."""
    if PRIVATE in os.environ or not shutil.which("unshare") or not shutil.which("ip"):
        return
    words = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if subprocess.run(
        [*words, "mount", "-t", "tmpfs", "none", "/run"], capture_output=True
    ).returncode:
        return
    script = 'mount -t tmpfs none /run && exec "$@"'
    os.environ[PRIVATE] = "1"
    os.execvp("unshare", [*words, "sh", "-c", script, "sh", sys.executable, *sys.argv])


def make_hosts() -> tuple[Host, Host]:
    """Return two hosts; in private namespaces they have a network of their own."""
    if PRIVATE not in os.environ:
        return Host("first", "127.0.0.1", "lo"), Host("second", "127.0.0.2", "lo")
    hosts = list[Host]()
    for number, name in enumerate(("first", "second")):
        ip("netns", "add", name)
        prefix = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c")
        prefix = (*prefix, f'hostname {name} && exec "$@"', "sh")
        hosts.append(Host(name, f"10.77.0.{number + 1}", f"cable{number}", prefix))
    cable = ("type", "veth", "peer", "name", "cable1", "netns", "second")
    ip("link", "add", "cable0", "netns", "first", *cable)
    for host in hosts:
        ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
        ip("-n", host.name, "link", "set", host.interface, "up")
        ip("-n", host.name, "link", "set", "lo", "up")
    return hosts[0], hosts[1]


def ip(*words: str) -> None:
    """Run ip."""
    subprocess.run(["ip", *words], check=True)


@dataclass(frozen=True)
class Trial:
    """Commands of msfp, by one process or by both hosts.

    Arguments:
        work: where all runs are.
        hosts: the two.
        processes: on each host.
    """

    work: Path
    hosts: tuple[Host, Host]
    processes: int

    def alone(self, *words: str) -> float:
        """Run a command in one process and return the seconds that it took."""
        start = time.monotonic()
        command = [sys.executable, "-m", "msfp_cli", *words]
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return time.monotonic() - start

    @contextmanager
    def started(self, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
        """Start a command on both hosts."""
        launched = [self._start(rank, words) for rank in range(2)]
        try:
            yield launched
        finally:
            for process in launched:
                kill_all(process.pid)
                process.wait()

    def _start(self, rank: int, words: tuple[str, ...]) -> subprocess.Popen[str]:
        host = self.hosts[rank]
        place = self.work / host.name
        place.mkdir(exist_ok=True)
        launcher = [ACCELERATE, "launch", "--multi_gpu"]
        launcher += ["--num_machines", "2", "--machine_rank", str(rank)]
        launcher += ["--num_processes", str(2 * self.processes)]
        launcher += ["--main_process_ip", self.hosts[0].address, "--main_process_port", str(PORT)]
        return subprocess.Popen(
            [*host.prefix, *launcher, "-m", "msfp_cli", *words],
            cwd=place,
            env={**os.environ, "GLOO_SOCKET_IFNAME": host.interface},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def together(self, *words: str) -> float:
        """Run a command on both hosts and return the seconds that it took."""
        start = time.monotonic()
        with self.started(*words) as launched:
            says = [process.communicate()[1] for process in launched]
        if any(process.returncode for process in launched):
            raise SystemExit("\n".join(says))
        return time.monotonic() - start

    def losing_the_second(self, file: Path, *words: str) -> tuple[float, str]:
        """Kill the second host when a file is there; return when the first ended, and its words."""
        with self.started(*words) as launched:
            while not file.exists():
                if any(process.poll() is not None for process in launched):
                    raise SystemExit(launched[0].communicate()[1])
                time.sleep(0.1)
            kill_all(launched[1].pid)
            start = time.monotonic()
            says = launched[0].communicate(timeout=120)[1]
        errors = [line for line in says.splitlines() if line.startswith("error: ")]
        return time.monotonic() - start, "; ".join(dict.fromkeys(errors))


def kill_all(number: int) -> None:
    """Kill a process and all that it started, at once as if the machine were gone."""
    children = dict[int, list[int]]()
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(place.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(place.parent.name))
    left = [number]
    while left:
        process = left.pop()
        left += children.get(process, [])
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def write_model(directory: Path, size: str) -> str:
    """Write a tiny pipeline and return its place, or return the built-in one."""
    if size == "fashion":
        return "fashion"
    sys.path.append(str(TESTS))
    from tiny_pipelines import save_tiny

    save_tiny("StableDiffusionPipeline", directory)
    return str(directory)


def different_files(one: Path, other: Path) -> list[str]:
    """Return the names of the files that two directories do not both hold, byte for byte."""

    def files(place: Path) -> set[tuple[str, bytes]]:
        found = (path for path in place.rglob("*") if path.is_file())
        return {(str(path.relative_to(place)), path.read_bytes()) for path in found}

    return sorted({name for name, _ in files(one) ^ files(other)})


def tuning_difference(one: Run, other: Run) -> float:
    """Return the largest difference of held-out errors, relative to the first's."""
    (path,) = (one.directory / "finetune").glob("*.safetensors")
    alone, both = (FinetuneState.load(run.finetuned(path.stem)) for run in (one, other))
    pairs = zip(alone.history, both.history, strict=True)
    return max(abs(ours.error - theirs.error) / ours.error for ours, theirs in pairs)


def compare(trial: Trial, model: str, options: list[str]) -> Iterator[str]:
    """Yield what comes of each trial, a line each."""
    runs = {name: Run(trial.work / name) for name in ("one", "both", "lost")}
    command = ["calibrate", model, *options]

    def place(name: str) -> list[str]:
        return ["--run", str(runs[name].directory)]

    def same(name: str) -> str:
        parts = ("recording", "held-out", "calibration")
        places = (tuple(runs[run].directory / part for run in ("one", name)) for part in parts)
        names = [different_files(*place) for place in places]
        equal = [part for part, different in zip(parts, names, strict=True) if not different]
        others = [f"not {file}" for files in names for file in files]
        return "; ".join([f"same bytes as one process: {', '.join(equal) or 'none'}", *others])

    yield f"calibrated by one process in {trial.alone(*command, *place('one')):.0f} s"
    seconds = trial.together(*command, *place("both"))
    yield f"calibrated by two hosts in {seconds:.0f} s; {same('both')}"
    shard = runs["lost"].recording / "00001.safetensors"
    seconds, error = trial.losing_the_second(shard, *command, *place("lost"))
    yield f"second host killed while recording: the first ended {seconds:.0f} s later: {error}"
    seconds = trial.together(*command, *place("lost"))
    yield f"the same command went on for {seconds:.0f} s; {same('lost')}"
    tune = ["finetune", "--steps", str(UPDATES), "--batch-size", "4", "--evaluate-every", "4"]
    tune += ["--calls-per-update", str(2 * trial.processes), "--device", "cpu"]
    seconds = trial.alone(*tune, "--num-processes", "1", *place("one"))
    yield f"fine-tuned by one process in {seconds:.0f} s"
    seconds = trial.together(*tune, *place("both"))
    difference = tuning_difference(runs["one"], runs["both"])
    yield f"fine-tuned by two hosts in {seconds:.0f} s; held-out errors differ by {difference:.1e}"


def main() -> None:
    """Make the hosts, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=("tiny", "fashion"), default="fashion")
    parser.add_argument("--processes", type=int, default=1, help="on each host")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    enter_private_namespaces()
    os.environ["OMP_NUM_THREADS"] = "1"
    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model = write_model(work / "model", arguments.size)
    images = "8" if arguments.size == "tiny" else "40"
    options = ["--num-images", images, "--batch-size", "2" if arguments.size == "tiny" else "4"]
    options += ["--steps", "4", "--device", "cpu"]
    hosts = make_hosts()
    kind = "network namespaces" if PRIVATE in os.environ else "loopback addresses"
    lines = [f"two {kind}, {arguments.processes} process of one thread on each"]
    print(lines[0], flush=True)
    for line in compare(Trial(work, hosts, arguments.processes), model, options):
        print(line, flush=True)
        lines.append(line)
    if arguments.markdown:
        put(arguments.markdown, "two_hosts.py", "\n".join(["```", *lines, "```"]))


if __name__ == "__main__":
    main()
