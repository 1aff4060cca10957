# SPDX-License-Identifier: Apache-2.0
"""How fast a training step is: rankfall beside the dense layer, beside peers, and beside what the machine allows.

    python benchmarks/speed.py [CASE ...] [--rounds 20] [--device cuda] [--out speed.json] [--plot speed.png]

Forward and backward pass (and Adam for tables) in float32 on one thread, or on a GPU. The rivals of a case take turns,
so that what else the machine does falls on all of them; medians of the rounds. The limit is the time of the arithmetic
at the speed of a large matrix product, or of the bytes at the speed of a large copy, whichever is longer; both are
measured first. Each case is written to the file of `--out` as it is done; what stands there from the same machine is
not measured again. All rivals run with memory that stays with the process, as `rankfall train` does: without it the
page faults of large outputs hide the differences.
Products go by the faster one of torch's libraries in rankfall, MKL or oneDNN, and by MKL in torch's dense layers and in
peers; "dense by oneDNN" is the dense layer with the products that rankfall makes.
Peak memory is that of a fresh process for each rival. On a GPU, where most of these steps wait for the host, they are
also replayed as CUDA graphs where they can be, and memory is what the allocator gave at its peak. Peers that are not
installed are left out; _peers.py says how they are installed. The versions of the others stand above the table, and
beside each case in the file.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _cases import Case, cases
from _device import Step, add_device, captured, on_gpu, seconds, use_device
from _peers import is_peer, packages, versions
from _report import machine, table

from rankfall._files import write_atomic
from rankfall._machine import calibrate
from rankfall._onednn import by_onednn, has_onednn
from rankfall._pages import keep_pages

_PEER_SECONDS = 120  # A rival whose first step takes longer is left out.
_AS_GRAPH = ", graph"
_OURS_AS_GRAPH = f"rankfall{_AS_GRAPH}"
_BY_ONEDNN = "dense by oneDNN"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    add_device(parser)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "RIVAL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_device(options.device)
    if options.memory_of:
        print(_peak(*options.memory_of))
        return
    keep_pages()
    calibrate()
    known = {case.name: case for case in cases()}
    unknown = [name for name in options.cases if name not in known]
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(known)}")
    flops, bandwidth = _speeds()
    print(f"{machine()}; {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s\n", flush=True)
    results = _earlier(options.out)
    done = {result["case"] for result in results}
    for name in [name for name in options.cases or known if name not in done]:
        case = known[name]
        rivals = [r for r in case.make if not (options.no_peers and is_peer(r))]
        result = {"peers": versions(rivals), **_timed(case, rivals, options.rounds)}
        result["limit"] = 1e3 * max(case.limit[0] / flops, case.limit[1] / bandwidth)
        if not options.no_memory:
            result["memory"] = {r: _peak_on_gpu(case, r) if on_gpu() else _measured_peak(name, r) for r in rivals}
        results.append({"case": name, "what": case.what, **result})
        print(f"{name}: " + ", ".join(f"{r} {ms:.2f} ms" for r, ms in result["ms"].items()), flush=True)
        if options.out:
            content = {"machine": machine(), "gflops": flops / 1e9, "gbytes": bandwidth / 1e9, "cases": results}
            write_atomic(options.out, lambda p, content=content: p.write_text(json.dumps(content, indent=2) + "\n"))
    print("\n" + _markdown(results))
    if options.plot:
        from _speed_picture import draw  # noqa: PLC0415  only a picture needs matplotlib

        draw(results, machine(), options.plot)


def _earlier(path: Path | None) -> list[dict]:
    """The cases that a file has of this machine."""
    content = json.loads(path.read_text()) if path and path.is_file() else {}
    return content["cases"] if content.get("machine") == machine() else []


def _speeds() -> tuple[float, float]:
    """(floating-point operations, bytes) in a second: of a product of two matrices of 1024, and of a copy of 64 MB.

    By the faster one of torch's libraries; on a GPU of matrices of 8192, and of 1 GB.
    """
    side, numbers = (8192, 2**28) if on_gpu() else (1024, 2**24)
    a, b = torch.randn(2, side, side)
    source, target = torch.randn(2, numbers)
    product = _median(lambda: torch.mm(a, b), 10)
    if not on_gpu() and has_onednn():
        product = min(product, _median(lambda: by_onednn(a, b), 10))
    copy = _median(lambda: target.copy_(source), 10)
    return 2 * side**3 / product, 2 * 4 * numbers / copy


def _median(step: Step, rounds: int) -> float:
    step()
    return statistics.median(seconds(step) for _ in range(rounds))


def _timed(case: Case, rivals: list[str], rounds: int) -> dict:
    torch.manual_seed(0)
    steps: dict[str, Step] = {}
    for rival in rivals:
        try:
            step = case.make[rival]()
            seconds(step)
            if seconds(step) < _PEER_SECONDS:
                steps[rival] = step
            if on_gpu():
                steps[f"{rival}{_AS_GRAPH}"] = captured(step)
        except (RuntimeError, MemoryError, ValueError, TypeError) as error:
            print(f"{case.name}: {rival} fails: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {rival: [] for rival in steps}
    for _ in range(rounds):
        for rival, step in steps.items():
            times[rival].append(1e3 * seconds(step))
    return {
        "ms": {r: statistics.median(t) for r, t in times.items()},
        "spread": {r: (sorted(t)[len(t) // 4], sorted(t)[3 * len(t) // 4]) for r, t in times.items()},
    }


def _peak(name: str, rival: str) -> int:
    """Bytes that three steps add at their peak to this process, the layer included (Linux only)."""
    case = next(case for case in cases() if case.name == name)
    Path("/proc/self/clear_refs").write_text("5")  # The highest mark is today's.
    before = _status("VmRSS")
    step = case.make[rival]()
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _peak_on_gpu(case: Case, rival: str) -> int | None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        step = case.make[rival]()
        for _ in range(3):
            step()
    except (RuntimeError, ValueError, TypeError):
        return None
    return torch.cuda.max_memory_allocated() - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def _measured_peak(name: str, rival: str) -> int | None:
    command = [sys.executable, __file__, "--memory-of", name, rival]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None


def _markdown(results: list[dict]) -> str:
    rows = []
    for result in results:
        ms, memory = result["ms"], result.get("memory", {})
        best = _best_peer(ms, as_graph=False)
        rows.append(
            (
                f"{result['case']}: {result['what']}",
                *_beside_dense(ms, ""),
                *(() if on_gpu() else (f"{ms[_BY_ONEDNN]:.2f}" if _BY_ONEDNN in ms else "",)),
                *(_beside_dense(ms, _AS_GRAPH) if on_gpu() else ()),
                *_beside_peer(ms, best, ms["rankfall"]),
                *(_beside_peer(ms, _best_peer(ms, as_graph=True), ms.get(_OURS_AS_GRAPH)) if on_gpu() else ()),
                f"{result['limit']:.2f}",
                " / ".join(_megabytes(memory.get(r)) for r in ("dense", "rankfall", best) if r) if memory else "",
            )
        )
    peers = ("best peer as a graph, ms", "faster by") if on_gpu() else ()
    beside = ("best peer, ms", "faster by", *peers, "limit, ms", "MB")
    graphs = ("dense as a graph, ms", "rankfall as a graph, ms", "of dense") if on_gpu() else (f"{_BY_ONEDNN}, ms",)
    shown = table(("case", "dense, ms", "rankfall, ms", "of dense", *graphs, *beside), rows)
    return f"{_caption(results)}\n\n{shown}"


def _best_peer(ms: dict[str, float], *, as_graph: bool) -> str | None:
    return min((r for r in ms if is_peer(r) and r.endswith(_AS_GRAPH) == as_graph), key=ms.__getitem__, default=None)


def _beside_peer(ms: dict[str, float], peer: str | None, ours: float | None) -> tuple[str, str]:
    if peer is None or ours is None:
        return "", ""
    return f"{ms[peer]:.3f}" if on_gpu() else f"{ms[peer]:.2f}", f"{ms[peer] / ours:.1f}"


def _caption(results: list[dict]) -> str:
    """The peers and their versions; what was measured on another day may have been of others."""
    known = dict.fromkeys(
        f"{package} {result.get('peers', {}).get(package, 'of an unknown version')}"
        for result in results
        for package in packages(result["ms"])
    )
    return f"Peers: {', '.join(known) or 'none'}."


def _beside_dense(ms: dict[str, float], how: str) -> tuple[str, str, str]:
    dense, ours = ms.get(f"dense{how}"), ms.get(f"rankfall{how}")
    both = [time and f"{time:.3f}" if on_gpu() else time and f"{time:.2f}" for time in (dense, ours)]
    return both[0] or "", both[1] or "", f"{ours / dense:.2f}" if dense and ours else ""


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


if __name__ == "__main__":
    main()
