"""Commands that study IRMs: evaluate, trace, analyze, explain, report, figures."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Optional

import typer

from realigner.cli import options as opt
from realigner.console import program, show
from realigner.errors import RealignerError, UsageError


def evaluate(
    context: typer.Context,
    irm: Annotated[Path, typer.Option("--irm", help="A run's folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the measurements; run the same command again to resume.")],
    baselines: Annotated[
        str, typer.Option(help="Methods to compare with, separated by commas, besides the bare host; or all, or none.")
    ] = "prompt,mean-delta",
    tune: Annotated[
        Optional[str],
        typer.Option(
            metavar="strength", help="strength: choose the best one on held-out questions and save it in the adapter."
        ),
    ] = None,
    questions: Annotated[
        Optional[int], typer.Option(help="Ask at most this many held-out questions; default: all.", min=8, show_default=False)
    ] = None,
    max_new_tokens: opt.MaxNewTokens = 60,
    max_kl: Annotated[
        float, typer.Option(help="Reject strengths with a KL above this on neutral text (nats per token).", min=0)
    ] = 1.0,
    max_shift: Annotated[
        float, typer.Option(help="Reject strengths that move the residual stream by more (in units of its size).", min=0)
    ] = 1.0,
    judge: Annotated[
        Optional[str],
        typer.Option(metavar="MODEL", help="A model behind an endpoint that rates the replies.", show_default=False),
    ] = None,
    endpoint: Annotated[
        Optional[str],
        typer.Option(help="Base URL of the judge, or of the --model, e.g. http://127.0.0.1:8000/v1.", show_default=False),
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option(
            metavar="HOST+IRM",
            help="The IRM's name at the endpoint, which then answers in place of a host here.",
            show_default=False,
        ),
    ] = None,
    host: opt.HostOfIrm = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Evaluate an IRM on questions that its run held out: does it work, compared with what, and at which strength?"""
    if tune is not None:
        opt.one_of("--tune", tune, ("strength",))
    opt.refuse_missing([irm])
    from realigner.evaluation.embeddings import refuse_missing_minilm
    from realigner.evaluation.evaluate import evaluate as measure, task_of
    from realigner.evaluation.measured import Effort
    from realigner.evaluation.methods import METHODS, find_method
    from realigner.evaluation.results import table
    from realigner.files import locked
    from realigner.runtime import load_host_of

    names = {"all": [method.name for method in METHODS], "none": []}.get(
        baselines, [name.strip() for name in baselines.split(",")]
    )
    for name in names:
        find_method(name)
    rated_by: Any = None
    server: Any = None
    if judge is not None:
        from realigner.data.endpoint import Endpoint

        rated_by = Endpoint(endpoint, judge, temperature=0.0)
    if model is not None:
        from realigner.evaluation.served_replies import ServedIRM

        if endpoint is None:
            raise UsageError("--model: names a model at an endpoint; give --endpoint too, or leave out --model")
        server = ServedIRM(endpoint, model)
    if endpoint is not None and judge is None and model is None:
        raise UsageError("--endpoint: say what to ask there: --judge MODEL, or --model HOST+IRM")
    task_of(irm, tune is not None)
    refuse_missing_minilm()
    opt.claim(context, locked(out))
    loaded, tokenizer = load_host_of(irm, host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    effort = Effort(reply_tokens=max_new_tokens)
    options: dict[str, Any] = {"max_kl": max_kl, "max_shift": max_shift, "judge": rated_by, "server": server}
    try:
        found = measure(irm, out, loaded, tokenizer, names, tune is not None, effort, questions, **options)
    except KeyboardInterrupt:
        raise RealignerError(f"interrupted; what was measured is in {out}, and the same command resumes") from None
    if as_json:
        opt.print_json(found.values)
        return
    show(f"{found.tone}, {found.results['questions']} questions that the run held out\n")
    show(table(found.results))
    if (choice := found.choice) is not None:
        show(
            f"\nstrength {choice.strength:g} (no clear difference from {choice.low:g} to {choice.high:g}); saved in the adapter"
        )
    show(f"Try next:  {program()} report {quote(str(out))} --out report.html    (tables, curves and examples)")


def trace(
    context: typer.Context,
    irm: opt.Irms,
    out: Annotated[Path, typer.Option(help="The zarr folder to write.")],
    questions: opt.Questions = None,
    prompts: opt.Prompts = None,
    keep: Annotated[
        str, typer.Option(help="summary, raw (every delta) or replay (h0, from which deltas are computed again).")
    ] = "summary",
    raw_dtype: Annotated[str, typer.Option(help="Dtype of raw deltas: float16, float32, or auto.")] = "auto",
    baselines: Annotated[bool, typer.Option(help="Trace the untrained twin of each seed too.")] = True,
    strength: opt.Strength = 1.0,
    host: opt.HostOfIrm = None,
    chat_template_kwargs: opt.TemplateKwargs = None,
    max_new_tokens: opt.MaxNewTokens = 80,
    seed: opt.Seed = 42,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Record what IRMs add, token by token, layer by layer, while they answer prompts."""
    opt.one_of("--keep", keep, ("summary", "raw", "replay"))
    opt.one_of("--raw-dtype", raw_dtype, ("auto", "float16", "float32"))
    asked = opt.prompts_from(questions, prompts)
    variables = opt.template_kwargs(chat_template_kwargs)
    from realigner.irm_sources import ready_made

    irm = [ready_made().get(str(place), place) if not place.exists() else place for place in irm]
    opt.refuse_missing(irm)
    from realigner.traces.store import held

    _, unfinished = opt.claim(context, held(out, force))
    from realigner.runtime import load_host_of
    from realigner.traces.collect import find_runs, sources_of, trace_runs

    sources = sources_of(find_runs(irm), baselines, strength)
    loaded, tokenizer = load_host_of(sources[0].folder, host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"keep": keep, "dtype": raw_dtype, "max_new_tokens": max_new_tokens, "seed": seed}
    options["chat_template_kwargs"] = variables
    try:
        recorded = trace_runs(sources, out, loaded, tokenizer, asked, **options, force=force, quiet=as_json)
    except KeyboardInterrupt:
        kept = f"the texts that were finished are in {unfinished.path}" if unfinished.path.exists() else "nothing was kept"
        raise RealignerError(f"interrupted; {kept}") from None
    sizes = {str(key): int(value) for key, value in recorded.sizes.items()}
    if as_json:
        opt.print_json({"trace": str(out), "sizes": sizes, "prompts": len(asked), "runs": recorded.attrs["runs"], "seed": seed})
        return
    names = ", ".join(recorded.attrs["runs"])
    show(f"{out}: {sizes['token']} tokens x {sizes['layer']} layers x {sizes['neuron']} neurons ({keep}), {len(asked)} prompts")
    show(f"runs, at strength {strength:g}: {names}")
    show(f"Try next:  {program()} analyze {quote(str(out))}")


def analyze(
    traces: Annotated[list[Path], typer.Argument(help="Zarr traces of one host; several are joined.")],
    permutations: Annotated[int, typer.Option(help="Number of permutations for p-values.", min=1)] = 1000,
    resamples: Annotated[int, typer.Option(help="Number of bootstrap resamples for intervals.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of all random draws.", min=0, max=2**32 - 1)] = 0,
    as_json: opt.Json = False,
) -> None:
    """Striation, consensus, timing, sparsity and turns of traces, each with its null, interval and n, and verdicts in words."""
    from realigner.traces import join_traces, load_trace
    from realigner.traces.store import damage_named

    opened = [load_trace(path) for path in traces]
    from realigner.analysis import analyze as ask

    with damage_named(*traces):
        found = ask(join_traces(opened) if len(opened) > 1 else opened[0], seed, permutations, resamples)
    if as_json:
        opt.print_json({"traces": [str(path) for path in traces], **found.to_dict()})
        return
    for verdict in found.verdicts:
        show(f"{verdict['verdict'].upper():14} {verdict['claim']}")
        show(f"{'':14} {verdict['words']}")
    show("Leading indices (times the median of their layer):")
    for run, table in found.leading.groupby("run", sort=False):
        show(f"   {run:24} " + "  ".join(f"{row.neuron} ({row.ratio:.2f})" for row in table.head(5).itertuples()))
    _show_replies(found.turns)
    show(f"Try next:  {program()} report {quote(str(traces[0]))} --out report.html    (--json has every table)")


def _show_replies(turns: Any) -> None:
    """What each reply of a conversation gets, where there are conversations."""
    if not len(turns):
        return
    show("Energy of a token by reply of the conversation:")
    shown = turns[(turns["run"] != "all") & turns["statistic"].isin(("energy", "energy_ratio"))]
    for run, table in shown.groupby("run", sort=False):
        *replies, last = table.to_dict("records")
        values = "  ".join(f"{row['value']:.3g}" for row in replies)
        between = f" ({last['low']:.3g} to {last['high']:.3g})" if math.isfinite(last["low"]) else ""
        show(f"   {run:24} {values}   last over first {last['value']:.3g}{between}")


def explain(
    context: typer.Context,
    irm: Annotated[
        Optional[list[Path]], typer.Option("--irm", help="A run's folder, or a sweep's (all its runs); repeatable.")
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder for trials and explain.json (default: explain); an existing one is resumed. With --weights-only: "
            "folder for weights.json (default: not written)."
        ),
    ] = None,
    index: Annotated[Optional[int], typer.Option(help="Index of the residual stream; by default the leading one.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, controls and trials, of 50 steps: minutes.")] = False,
    trials: Annotated[bool, typer.Option(help="Retrain with one thing changed at a time.")] = True,
    steps: Annotated[
        Optional[int], typer.Option(help="Maximum steps per trial; by default as many as the run took, 50 with --quick.", min=1)
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Measure --host's weights alone: a folder of safetensors, never loaded.")
    ] = False,
    on: Annotated[str, typer.Option(help="Where trials are trained: here, local (processes) or ray.")] = "here",
    workers: Annotated[int, typer.Option(help="Trials at a time, with --on local or ray.", min=1)] = 1,
    host: opt.HostOfIrm = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the explain.json of OUT; its trials are kept.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Why this index? Measurements of the host, ablations, trials with one thing changed, and a verdict."""
    if weights_only:
        _explain_weights(context, host, index, out, force, as_json)
        return
    out = out or Path("explain")
    if not irm:
        raise UsageError("explain: give a run with --irm, or --weights-only with --host")
    opt.one_of("--on", on, ("here", "local", "ray"))
    if on == "here" and workers > 1:
        raise UsageError(f"--workers {workers}: --on here trains one after the other; give --on local or ray")
    opt.refuse_missing(irm)
    from realigner.explain.explanation import EXPLANATION, RESULT_FILE
    from realigner.files import taken

    opt.claim(context, taken(out / RESULT_FILE, EXPLANATION, force))
    from realigner.runtime import load_host_of
    from realigner.traces.collect import find_runs

    folders = find_runs(irm)
    loaded, tokenizer = load_host_of(folders[0], host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    from realigner.explain import explain as ask

    found = ask(folders, out, loaded, tokenizer, index, quick, trials, on, workers, as_json, steps, force)
    if as_json:
        opt.print_json(found.to_dict())
        return
    show(f"\n{found.words}")
    for conclusion in found.conclusions:
        show(f"{conclusion.answer.upper():14} {conclusion.question}")
        show(f"{'':14} {conclusion.words}  n = {conclusion.n} {conclusion.unit}")
    named = f" --host {quote(host)}" if host else ""
    show(f"Try next:  {program()} report {quote(str(out))}{named} --out report.html    ({out}/explain.json has every table)")


def _explain_weights(
    context: typer.Context, host: str | None, index: int | None, out: Path | None, force: bool, as_json: bool
) -> None:
    """What weights alone say: of one index, or of those that are furthest out of the ordinary."""
    if host is None:
        raise UsageError("explain: --weights-only needs --host, a folder with a model's config.json and safetensors")
    from realigner.explain.weights_only import WEIGHTS, WEIGHTS_FILE, save_weights_report, weights_report
    from realigner.files import taken
    from realigner.gguf_cache import EMBEDDED, embedded_folder

    if out is not None:
        opt.claim(context, taken(out / WEIGHTS_FILE, WEIGHTS, force))
    found = weights_report(embedded_folder() if host == EMBEDDED else host, index)
    if out is not None:
        save_weights_report(found, out, force)
    if as_json:
        opt.print_json(found)
        return
    show(f"{found['host']}: {found['neurons']:,} indices, {found['layers']} layers, {found['norm']} norm")
    for entry in found["indices"]:
        show(f"index {entry['index']}: {entry['words']}")
        for fact in entry["facts"]:
            times = "" if fact["times_median"] is None else f", {fact['times_median']:.3g} times the median"
            show(f"   {fact['about']:48} {fact['value']:.4g}{times} (rank {fact['rank']} of {fact['n']:,})")
    kept = f"; {out / WEIGHTS_FILE} has these numbers" if out is not None else ""
    show(f"Try next:  {program()} explain --irm RUN    (with a trained IRM: what it makes of them{kept})")


def report(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of runs and sweeps (prompts are answered now), zarr traces, folders of explain and of evaluate."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file.")],
    strength: opt.Strength = 1.0,
    host: opt.HostOfIrm = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Write one self-contained HTML page over runs, sweeps, traces, explanations and evaluations."""
    opt.refuse_missing(sources)
    from realigner.files import taken
    from realigner.report.html_report import REPORT, build_report
    from realigner.report.report_input import check_hosts, untraced

    opt.claim(context, taken(out, REPORT, force))
    given = [Path(source) for source in sources]
    places = untraced(given)
    how = {"strength": strength != 1.0, "host": host, "dtype": dtype != "auto", "device": device != "auto"}
    if not places and (flag := next((name for name, value in how.items() if value), None)):
        raise UsageError(f"--{flag}: is for runs that are traced now, and these sources have their traces; leave it out")
    with tempfile.TemporaryDirectory() as aside:
        if places:
            from realigner.hosts import host_name
            from realigner.runtime import load_host_of
            from realigner.traces.collect import find_runs, trace_for_report

            folders = find_runs(places)
            loaded, tokenizer = load_host_of(folders[0], host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            check_hosts(given, host_name(loaded))
            made = Path(aside) / (places[0] if places[0] in given else folders[0]).resolve().name
            trace_for_report(folders, made, loaded, tokenizer, strength, quiet=as_json)
            given = [made, *(source for source in given if source not in places)]
        path, shown = build_report(given, out, force)
        if as_json:
            opt.print_json({"report": str(path), "answers": {item.name: item.answers() for item in shown}})
        else:
            show(f"Report: {path}   (open it in a browser)")


def figures(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(help="A zarr trace.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Write the paper's figures of a trace as PNG, SVG and PDF."""
    opt.refuse_missing([trace])
    from realigner.files import taken
    from realigner.report.paper_figures import FIGURES, save_figures

    opt.claim(context, taken(out, FIGURES, force))
    from realigner.analysis import analyze as ask
    from realigner.report import gather
    from realigner.traces import load_trace
    from realigner.traces.store import damage_named

    with damage_named(trace):
        found = gather(trace.name, load_trace(trace))
        written = save_figures(found.trace, ask(found.trace), out, found.records, force=force)
    if as_json:
        opt.print_json({"figures": [str(path) for path in written]})
    else:
        show(f"{len(written)} files in {out}")
