"""The Hopper figures of bench/RESULTS.md, as jobs: they wait for a free GPU, and each GPU runs one at a time.

    python3 gpu_scripts/bench_hopper.py out/gpu --seconds 420 --before TREE --only plans-128k plans-1m

All jobs unless some are named. A job that outlasts its time, or the whole's, is ended; figures it has are kept, because
every command writes its file after every case. A command or job that fails costs no other, but the exit status is 1
then, as for one that was ended. Output goes to files in the directory given, which keeps a tuned table that it has; a
short table comes last.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUNED = ROOT / "pallas_kernels/attention/hopper/gpu_tuned.json"
DONE = "done"
"""First word of the outcome of a job all of whose commands ended with status 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Commands that one GPU runs one after another; `seconds` is what they may take together."""

    name: str
    seconds: int
    commands: list[list[str]]


def all_jobs(python: str, results: Path, before: Path | None) -> list[Job]:
    """In the order in which they matter; the commands of `before` run in that tree, on the same GPU as this one's."""

    def bench(name: str, *arguments: str, tree: Path = ROOT) -> list[str]:
        paths = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = ["env", "-C", str(tree), f"PYTHONPATH={paths}", python, "-m", "mmi_jax.cli", "bench", *arguments]
        return [*command, "--json-file", str(results / f"{name}.json")]

    def plans(name: str, tokens: int, *cases: str, repeats: int = 3, heads: str = "28/4", tree: Path = ROOT):
        chosen = [word for case in cases for word in ("--case", case)]
        options = ["--tokens", str(tokens), "--repeats", str(repeats), "--heads", heads]
        return bench(name, "plans", *options, *chosen, tree=tree)

    boundaries = ("2d-boundary", "q-boundary")
    new = plans("plans-128k", 2**17, *boundaries, "grid", repeats=5)
    old = [plans("plans-128k-before", 2**17, *boundaries, "grid", repeats=5, tree=before)] if before else []
    table = results / "gpu_tuned.json"
    tune = ["--heads", "28/4", "--heads", "32/8", "--repeats", "3", "--table", str(table)]
    dims = [word for d in (64, 256) for word in ("--head-dim", str(d))]
    tune_long = ["--head-dim", "128", "--heads", "32/8", "--tokens", str(2**17), "--repeats", "3"]
    tune_long += ["--table", str(results / "tuned-128k.json")]  # a table of its own: the other's is for all lengths
    attention = ["--case", "all * 128K", "--case", "random32 28/4 128K", "--repeats", "3"]
    return [
        Job(name="plans-128k", seconds=200, commands=[*old, new]),
        Job(name="check", seconds=400, commands=[[str(ROOT / "gpu_scripts/check_hopper.sh"), str(results / "check")]]),
        Job(name="plans-512k", seconds=200, commands=[plans("plans-512k", 2**19, "grid", "a-shape", *boundaries)]),
        Job(name="plans-1m", seconds=200, commands=[plans("plans-1m", 2**20, "grid", "a-shape", *boundaries)]),
        Job(name="tune", seconds=300, commands=[bench("tune", "tune", *dims, *tune)]),
        Job(
            name="plans-512k-more",
            seconds=200,
            commands=[plans("plans-512k-more", 2**19, "mix", "vertical-slash", "grid-slash")],
        ),
        Job(name="plans-32-8", seconds=120, commands=[plans("plans-32-8", 2**17, "mix", "grid", heads="32/8")]),
        Job(name="tune-128k", seconds=150, commands=[bench("tune-128k", "tune", *tune_long)]),
        Job(name="attention", seconds=120, commands=[bench("attention", "attention", *attention)]),
    ]


def run_job(job: Job, gpu: str, arguments) -> str:
    """The outcome of the job; a command that fails does not keep those after it from running."""
    start, failed = time.monotonic(), []
    for command in job.commands:
        print(f"+ GPU {gpu}: {' '.join(command)}\n", end="", flush=True)  # one write: threads print side by side
        if arguments.dry_run:
            continue
        left = min(arguments.end, start + job.seconds) - time.monotonic()
        if left <= 0:
            return f"ended after {time.monotonic() - start:.0f} s"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHON": os.environ.get("PYTHON", sys.executable)}
        with open(arguments.results / f"{job.name}.log", "a") as log:
            process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            arguments.running[gpu] = process
            try:
                status = process.wait(timeout=max(left, 1))
            except subprocess.TimeoutExpired:
                return f"ended after {time.monotonic() - start:.0f} s"
            finally:
                kill(process)
                process.wait()
        if status:
            failed.append(str(status))
    seconds = time.monotonic() - start
    return f"status {', '.join(failed)} after {seconds:.0f} s" if failed else f"{DONE} in {seconds:.0f} s"


def kill(process: subprocess.Popen) -> None:
    """Kills a command that is not known to have ended, and all that it started, which is a session of its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.killpg(process.pid, signal.SIGKILL)


def stop(arguments) -> None:
    """Ends what runs and lets nothing more begin: the table of what there is is printed all the same."""
    arguments.end = time.monotonic()
    for process in list(arguments.running.values()):
        kill(process)


def work(gpu: str, jobs: "queue.SimpleQueue[Job]", outcomes: dict[str, str], arguments) -> None:
    """Runs jobs on one GPU until there are none, or no time."""
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return
        if time.monotonic() > arguments.end:
            outcomes[job.name] = "not begun: no time left"
            continue
        try:
            outcomes[job.name] = run_job(job, gpu, arguments)
        except OSError as error:  # no log, no process: the jobs that wait for this GPU still run
            outcomes[job.name] = f"not run: {error}"


def lines_of(path: Path) -> list[str]:
    """`plan_lines`, or one that says why a file has none: whatever lies in the directory, the table is printed."""
    try:
        return plan_lines(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [f"{path.stem:18} cannot be read: {type(error).__name__}: {error}"]


def plan_lines(path: Path) -> list[str]:
    """A line for each plan of a file of figures."""
    lines = []
    for case in json.loads(path.read_text())["cases"]:
        if "error" in case:
            lines.append(f"{path.stem:18} {case['case']}: {case['error'][:200]}")
        elif "plan_ms" in case:
            names = ("views", "plan", "permute", "attend", "undo")
            parts = " ".join(f"{name} {case[name + '_ms']:.2f}" for name in names)
            overhead, speedup = case["overhead_fraction"], case.get("speedup", "")
            figures = f"{case['tokens']:8} {case['heads']} {case['case']:15} tiles {case['density']:.1%} {parts}"
            lines.append(f"{path.stem:18} {figures} whole {case['median_ms']:.2f} overhead {overhead:.1%} x {speedup}")
        elif "tflops_per_s" in case:
            others = "; ".join(f"{x['name']} x {x.get('speedup')}" for x in case.get("others", ()))
            lines.append(f"{path.stem:18} {case['case']}: {case['tflops_per_s']} TFLOP/s {others}")
    return lines


def check_arguments(parser: argparse.ArgumentParser, arguments, names: list[str]) -> None:
    """Ends the program for arguments that no job could run with; makes the directory of results."""
    if unknown := set(arguments.only) - set(names):
        parser.error(f"jobs must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if arguments.before is not None and not arguments.before.is_dir():
        parser.error(f"--before must be a directory, got {arguments.before}")
    if len(set(arguments.gpus)) < len(arguments.gpus) or not all(arguments.gpus):
        parser.error(f"--gpus must be different numbers, got {arguments.gpus}")
    if not arguments.dry_run:
        try:
            arguments.results.mkdir(parents=True, exist_ok=True)
            if not (arguments.results / TUNED.name).exists():  # what was tuned is written over this copy
                shutil.copyfile(TUNED, arguments.results / TUNED.name)
        except OSError as error:
            parser.error(f"results must be a directory that can be written, got {arguments.results}: {error}")
        if not os.access(arguments.results, os.W_OK):
            parser.error(f"results must be a directory that can be written, got {arguments.results}")


def main() -> int:
    """Runs the jobs and prints their outcomes; 1 unless all were done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="JOB")
    parser.add_argument("--seconds", type=int, default=3600, help="for everything")
    parser.add_argument("--before", type=Path, help="another checkout, whose plans at 128K are timed first")
    parser.add_argument("--gpus", nargs="+", default=os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    arguments = parser.parse_args()
    arguments.end, arguments.running = time.monotonic() + arguments.seconds, {}
    arguments.results = arguments.results.resolve()
    before = arguments.before.resolve() if arguments.before else None
    jobs = all_jobs(os.environ.get("PYTHON", sys.executable), arguments.results, before)
    check_arguments(parser, arguments, [job.name for job in jobs])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop(arguments))
    chosen = [job for job in jobs if not arguments.only or job.name in arguments.only]
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in chosen:
        waiting.put(job)
    outcomes: dict[str, str] = {}
    threads = [threading.Thread(target=work, args=(gpu, waiting, outcomes, arguments)) for gpu in arguments.gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if arguments.dry_run:
        return 0
    for path in sorted(arguments.results.glob("*.json")):
        if "tuned" not in path.name:
            print(*lines_of(path), sep="\n")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return int(not all(outcomes.get(job.name, "").startswith(DONE) for job in chosen))


if __name__ == "__main__":
    sys.exit(main())
