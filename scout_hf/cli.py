"""The command line. Everything heavy is imported inside the commands, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scout_hf.cli_shared import (
    benchmark,
    evaluation,
    must_be_there,
    must_lead_to_a_folder,
    must_run,
    tell,
    told,
    typed,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Long-context decoding for HuggingFace Transformers: KV in host memory, attended block-sparsely.",
)

bench = typer.Typer(no_args_is_help=True, help="How fast this machine attends and decodes, beside its own limits.")
app.add_typer(bench, name="bench")

harness = typer.Typer(no_args_is_help=True, help="lm-eval with scout_hf: LongBench, RULER and any other of its tasks.")
app.add_typer(harness, name="lm-eval")
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

Seed = Annotated[int, typer.Option(help="Decides documents and questions.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch; more than the free cores slow a small model down.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON, and a plot.")]
Repeat = Annotated[int, typer.Option(min=3, help="Timed calls of each kind, in random order.")]
Device = Annotated[str, typer.Option(help="A GPU: cuda, cuda:1; cpu shows that it runs, and measures nothing.")]
SELECTED = [1024, 4096, 16384, 65536]
CONTEXTS = [0, 32768, 131072]


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=256, help="Length of the document.")] = 8192,
    questions: Annotated[int, typer.Option(min=1, help="How many of its hidden facts to ask for.")] = 8,
    seed: Seed = 0,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and layer when sparse.")] = 1024,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 16,
    threads: Threads = 1,
) -> None:
    """Ask questions about a long document: stock attention, exact, sparse. Fails if exact differs from stock."""
    with evaluation(threads):
        from scout_hf.eval.demo import run

        same = run(tokens, questions, seed, budget, block_size)
    raise typer.Exit(0 if same else 1)


@app.command()
def fidelity(
    quick: Annotated[bool, typer.Option("--quick/--full", help="Minutes, or the whole study.")] = True,
    only: Annotated[list[str], typer.Option(help="Part of it, as in mode=real,predicted; may be repeated.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder for results; a run that was ended goes on from there.")] = Path(
        "fidelity"
    ),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, one thread each; as many as cores.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Per cell; 32 or 48 by default.")] = None,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    report: Annotated[Path | None, typer.Option(help="Measure nothing: show this fidelity.json.")] = None,
    readme: Annotated[Path | None, typer.Option(help="File whose table of results to make anew.")] = None,
) -> None:
    """Accuracy and perplexity lost to selection and to the predicted query: budgets, blocks, digests, contexts."""
    with told():
        must_be_there(report, readme)
    with evaluation(1):
        from scout_hf.eval.fidelity import report as reports
        from scout_hf.eval.fidelity.readme import COMMAND, markdown
        from scout_hf.eval.fidelity.study import study
        from scout_hf.eval.markdown import update
        from scout_hf.kernels.cpu.topology import usable_cpus

        processes = jobs or len(usable_cpus())
        record = reports.load(report) if report else study(quick, only, processes, out, seed, questions, fresh, tell)
        reports.show(record)
        if readme:
            tell(f"{readme} {'changed' if update(readme, COMMAND, markdown(record)) else 'is up to date'}")
    raise typer.Exit(1 if record.get("failed") else 0)


@bench.command("cpu-kernel")
def cpu_kernel(
    tokens: Annotated[list[int], typer.Option(help="Selected tokens; may be given several times.")] = SELECTED,
    cache_tokens: Annotated[int, typer.Option(help="Tokens that they are scattered over.")] = 131072,
    heads: Annotated[tuple[int, int], typer.Option(help="Query heads and KV heads.")] = (32, 8),
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="CPUs to use.")] = 1,
    repeat: Repeat = 30,
    dense: Annotated[int, typer.Option(min=0, help="Calls of torch over the whole cache; slow.")] = 3,
    out: Out = None,
) -> None:
    """Attention over scattered blocks beside bare reads of the same memory, torch, and int8; takes two minutes."""
    with benchmark(out, threads) as finish:
        from scout_hf.eval.bench.cpu_kernel import run

        shape = (*heads, head_dim, block_size)
        finish(run(tokens, cache_tokens, *shape, threads, repeat, dense, tell=tell))


@bench.command("cpu-decode")
def cpu_decode(
    contexts: Annotated[
        list[int], typer.Option(min=0, help="Tokens in the cache; may be given several times.")
    ] = CONTEXTS,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and layer.")] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPUs to use; as many as torch takes by itself.")] = None,
    repeat: Repeat = 20,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; fewer take less time and memory.")] = 16,
    prefill_tokens: Annotated[int, typer.Option(min=0, help="Length of the prompt to read; 0 for none.")] = 8192,
    prefill_layers: Annotated[int, typer.Option(min=1, help="That read it; the cost per layer is the same.")] = 2,
    memory_tokens: Annotated[int, typer.Option(min=0, help="Context to measure memory for; 0 for none.")] = 32768,
    out: Out = None,
) -> None:
    """Steps of a model shaped like Llama 3.2 1B, stock and patched, with long caches; takes several minutes."""
    with benchmark(out, threads) as finish:
        from scout_hf.eval.bench.cpu_decode import run

        sizes = (layers, prefill_tokens, prefill_layers, memory_tokens)
        finish(run(contexts, budget, block_size, threads, repeat, *sizes, tell=tell))


@bench.command("methods")
def methods(
    contexts: Annotated[
        list[int] | None, typer.Option(help="Tokens in the cache; several times. 8k, 16k, 32k.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option(help="Rows; several times. 4.")] = None,
    way: Annotated[
        list[str] | None, typer.Option("--way", "--methods", help="Such as 'scout' or 'stock,dense'; several times.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and layer.")] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 32,
    shape: Annotated[
        str, typer.Option("--shape", "--local-model", help="gqa, mha, llama-3-8b, qwen3-14b, or a model's folder.")
    ] = "gqa",
    layers: Annotated[int | None, typer.Option(min=1, help="Of a model with random weights; 4.")] = None,
    device: Annotated[
        str, typer.Option(help="Of that model: cpu, where both tiers are in host memory, or cuda.")
    ] = "cpu",
    memory_gib: Annotated[
        list[float] | None, typer.Option(help="Also as many rows as so much memory of the device takes; several times.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Of the trained model; several times. needle, values.")] = None,
    model: Annotated[str, typer.Option(help="The trained model that is asked: llama or qwen3.")] = "llama",
    questions: Annotated[int | None, typer.Option(min=1, help="Per task; 32.")] = None,
    emulate: Annotated[
        str | None, typer.Option(help="'paper': link and CPU in the proportions of its machine.")
    ] = None,
    link_gbps: Annotated[float | None, typer.Option(help="Emulated link, GB/s of KV.")] = None,
    cpu_gbps: Annotated[float | None, typer.Option(help="Emulated CPU, GB/s of KV.")] = None,
    drift: Annotated[float, typer.Option(min=0, help="Share of the chosen blocks that changes per step.")] = 0.1,
    kvpress_python: Annotated[
        str | None, typer.Option(help="An interpreter that has kvpress, which wants another transformers.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="For the model, and as many for the CPU's share.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: a look, in about a minute.")] = False,
    seed: Seed = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what DIR/methods.json has.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and plots; a run that was ended goes on.")] = None,
) -> None:
    """Every method, scout's ablations and stock caches: speed, memory, link, and answers from the same run."""
    with told():
        must_lead_to_a_folder("--shape", shape)
        must_run("--kvpress-python", kvpress_python)
    with benchmark(out, threads, goes_on=True, device=device) as finish:
        from scout_hf.eval.methods.run import QUICK, run
        from scout_hf.eval.methods.ways import parse

        given = {"contexts": contexts, "batches": batches, "layers": layers, "tasks": task, "questions": questions}
        given |= {"memory_gib": memory_gib, "equal_context": max(contexts or [0])}
        given = (QUICK if quick else {}) | {name: value for name, value in given.items() if value}
        given |= {"budget": budget, "block_size": block_size, "model": model, "emulate": emulate, "seed": seed}
        given |= {"link_gbps": link_gbps, "cpu_gbps": cpu_gbps, "drift": drift, "fresh": fresh, "chosen": parse(way)}
        given |= {"shape": shape, "device": device, "kvpress_python": kvpress_python, "command": typed()}
        finish(run(**given, path=out / "methods.json" if out else None, tell=tell))


@app.command()
def trace(
    out: Annotated[Path, typer.Option(help="The timeline, ending in .json; a picture goes beside it.")] = Path(
        "step.json"
    ),
    model: Annotated[str, typer.Option(help="A pocket model, llama or qwen3, or the folder of a model.")] = "llama",
    context: Annotated[int, typer.Option(min=256, help="Tokens that are read before.")] = 4096,
    method: Annotated[str, typer.Option(help="Such as 'scout' or 'dense'.")] = "scout",
    split: Annotated[str | None, typer.Option(help="Of ScoutConfig; 'cpu' on a CPU, else 'auto'.")] = None,
    cpu_query: Annotated[str | None, typer.Option(help="Of scout; 'predicted'.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens attended per layer; an eighth of the context.")] = None,
    resident: Annotated[int | None, typer.Option(help="Tokens kept on the device; half of the budget.")] = None,
    link_gbps: Annotated[float | None, typer.Option(help="Emulated link, GB/s of KV.")] = None,
    cpu_gbps: Annotated[float | None, typer.Option(help="Emulated CPU, GB/s of KV.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to keep, the last ones.")] = 2,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu",
    threads: Threads = 1,
    seed: Seed = 0,
) -> None:
    """A timeline of decode steps for Perfetto and a picture: who does what, when, and who waits for whom."""
    with told():
        from scout_hf.files import check_timeline_path

        check_timeline_path(out, out.with_suffix(".png"))
        must_lead_to_a_folder("--model", model)
    with evaluation(threads, device):
        from scout_hf.eval.timeline import run

        options = {"split": split, "cpu_query": cpu_query, "budget": budget, "resident": resident}
        options |= {"link_gbps": link_gbps, "cpu_gbps": cpu_gbps}
        run(out, model, context, method, options, steps, device, seed)


@app.command("plan")
def plan_command(
    model: Annotated[
        str,
        typer.Option(
            help="llama-2-7b, llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-8b, qwen3-14b, qwen3-32b; or a config.json, "
            "or its folder."
        ),
    ] = "llama-3-8b",
    gpu: Annotated[
        str,
        typer.Option(help="h200, h100, a100-80, a100-40, l40s, rtx-5090, rtx-4090, rtx-3090; --machine for others."),
    ] = "h100",
    context: Annotated[int, typer.Option(min=1, help="Tokens.")] = 65536,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    budget: Annotated[int, typer.Option(min=1, help="Tokens attended per step and layer.")] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 32,
    link: Annotated[float | None, typer.Option(help="Host to device, GB/s.")] = None,
    dram: Annotated[float | None, typer.Option(help="GB/s of KV that the CPU attends.")] = None,
    device_gib: Annotated[float | None, typer.Option(help="Memory of the GPU.")] = None,
    host_gib: Annotated[float | None, typer.Option(help="Memory of the host.")] = None,
    layer_us: Annotated[
        float | None, typer.Option(help="Launches per layer, in microseconds; 20 in one graph.")
    ] = None,
    cpu_ratio: Annotated[float, typer.Option(min=0, max=1, help="CPU's share of scout's chosen blocks.")] = 0.1,
    machine: Annotated[Path | None, typer.Option(help="Constants that --measure wrote.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Read the constants off this machine.")] = False,
    check: Annotated[Path | None, typer.Option(help="A benchmark's JSON to hold predictions against.")] = None,
    out: Annotated[Path, typer.Option(help="Where --measure writes.")] = Path("machine.json"),
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch, for --measure.")] = None,
) -> None:
    """Will it fit, will it pay: memory, step time and break-even of every method, on machines one does not have."""
    # Only what is measured takes torch.
    with evaluation(threads) if measure else told():
        from scout_hf.eval.plan import command

        given = {"link_gbps": link, "cpu_gbps": dram, "device_gib": device_gib, "host_gib": host_gib}
        given["layer_us"] = layer_us
        if measure:
            command.measure(out, tell)
        elif check:
            command.check(check, machine)
        else:
            command.show(model, gpu, machine, given, (context, batch, budget, block_size, cpu_ratio))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS", help="JSON files, or folders of them.")] = [  # noqa: B006
        Path("eval/results")
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One HTML page, without references to the network, of everything that was measured."""
    with told():
        from scout_hf.eval.report.find import find

        find(results, out)
        from scout_hf.eval.report.page import write

        for used in write(results, out):
            typer.echo(f"from  {used}")
        typer.echo(f"wrote {out}")


@bench.command("gpu-kernel")
def gpu_kernel(
    device: Device = "cuda",
    heads: Annotated[list[str] | None, typer.Option(help="Query/KV heads, as in 32/8; several times.")] = None,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be given several times.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens, all attended; several times.")] = None,
    block_size: Annotated[list[int] | None, typer.Option(help="Tokens per block; several times.")] = None,
    selected: Annotated[int, typer.Option(help="Tokens of blocks that lie scattered.")] = 2048,
    cache_tokens: Annotated[int, typer.Option(help="Tokens that they are scattered over.")] = 65536,
    selected_batch: Annotated[int, typer.Option(min=1, help="Rows of these.")] = 16,
    score_tokens: Annotated[list[int] | None, typer.Option(help="Contexts whose digests to score.")] = None,
    score_batch: Annotated[int, typer.Option(min=1, help="Rows of these.")] = 8,
    repeat: Annotated[int | None, typer.Option(min=3, help="Samples of each, in random order; 10.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes: a look, in about two minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Decides queries, keys, values and selections.")] = 0,
    out: Out = None,
) -> None:
    """The Triton decode kernel with and without L2 prefetch, beside torch, FlashInfer, FlashAttention; tunes it."""
    with benchmark(out, None, device=device) as finish:
        from scout_hf.eval.bench.gpu_kernel import QUICK, parse_heads, run

        given = {"batches": batch, "contexts": context, "block_sizes": block_size, "score_tokens": score_tokens}
        given |= {"heads": [parse_heads(one) for one in heads or ()], "repeat": repeat}
        sizes = (QUICK if quick else {}) | {name: value for name, value in given.items() if value}
        scattered = {"selected": selected, "cache_tokens": cache_tokens, "selected_batch": selected_batch}
        finish(run(device, head_dim=head_dim, score_batch=score_batch, seed=seed, tell=tell, **scattered, **sizes))


@bench.command("gpu-decode")
def gpu_decode(
    device: Device = "cuda",
    model: Annotated[list[str] | None, typer.Option(help="llama-3-8b or qwen3-14b; both by default.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the models to so many; figures say so.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; several times.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be given several times.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Such as 'stock' or 'scout flags'; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps of each arm.")] = 32,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and layer.")] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 32,
    digest: Annotated[str, typer.Option(help="Digest whose scores are computed.")] = "minmax",
    cpu_query: Annotated[str, typer.Option(help="As in ScoutConfig: auto, predicted or real.")] = "auto",
    gpu_kernels: Annotated[str, typer.Option(help="As in ScoutConfig: auto, torch or triton.")] = "auto",
    drift: Annotated[float, typer.Option(min=0, help="Share of the chosen blocks that changes per step.")] = 0.1,
    compiled: Annotated[bool, typer.Option("--compile", help="Also a static cache with torch.compile.")] = False,
    caps: Annotated[str, typer.Option(help="GiB, as in 24,40,80: the largest batch within each.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="CPUs to use; as many as torch takes by itself.")] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, keys and values.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what DIR/gpu_decode.json has.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for JSON and a plot; a run that was ended goes on there.")
    ] = None,
) -> None:
    """Decode steps of random models shaped like real ones: stock caches beside Scout's hand-overs."""
    with benchmark(out, threads, goes_on=True, device=device) as finish:
        from scout_hf.eval.bench.gpu_decode import parse_caps, run

        given = {"models": model, "contexts": context, "batches": batch, "arms": arm}
        given = {name: value for name, value in given.items() if value}
        given |= {"steps": steps, "budget": budget, "block_size": block_size, "digest": digest}
        given |= {"cpu_query": cpu_query, "gpu_kernels": gpu_kernels, "drift_share": drift, "compiled": compiled}
        given |= {"caps": parse_caps(caps), "threads": threads, "seed": seed, "layers": layers}
        path = out / "gpu_decode.json" if out else None
        finish(run(device, **given, path=path, fresh=fresh, tell=tell))


@harness.command("run", context_settings=PASSED_ON, help="Evaluate, with any option of lm-eval run; see run --help.")
@harness.command("ls", context_settings=PASSED_ON, help="List tasks, as lm-eval ls does.")
@harness.command("validate", context_settings=PASSED_ON, help="Check tasks, as lm-eval validate does.")
def lm_eval(context: typer.Context) -> None:
    """One of lm-eval's own commands; everything after its name is passed on."""
    from scout_hf.eval.harness.command import main

    raise typer.Exit(main([context.info_name, *context.args]))


@harness.command("make-data")
def make_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it does not exist.")],
    rows: Annotated[int, typer.Option(min=1, help="Per data set.")] = 20,
    tokens: Annotated[int, typer.Option(min=256, help="Length of the longest document.")] = 1024,
    seed: Seed = 0,
) -> None:
    """Write small data sets in LongBench's format for the pocket model, to be used with --longbench-dir."""
    with told():
        folder.mkdir(parents=True, exist_ok=True)
        from scout_hf.eval.harness.pocket_longbench import make_longbench

        for path in make_longbench(folder, rows, tokens, seed):
            typer.echo(path)


@app.command()
def version() -> None:
    """Versions and hardware, for bug reports."""
    with told():
        from scout_hf.about import facts

        for name, value in facts():
            typer.echo(f"{name:<13} {value}")
