"""The command line: words in, exit code out. The work is done elsewhere, and imported when it is asked for.

Exit codes: 0 done, 1 it did not work out or a regression was found, 2 the question was wrong, 130 broken off.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from effbench import options as opt
from effbench.errors import EffbenchError, UsageError
from effbench.report.output import console, print_json, print_table, write_page

WORDS: type[Exception] = typer.BadParameter.__bases__[0]
"""The root of what typer raises for words it cannot make sense of."""

app = typer.Typer(
    name="effbench",
    help="One honest row per compressed language model: quality, speed, memory and energy of the very same object.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"effbench {version('effbench')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def run(
    model: opt.MaybeModel = None,
    techniques: opt.Techniques = None,
    suite: opt.Suite = None,
    tasks: opt.Tasks = None,
    num_fewshot: opt.NumFewshot = None,
    apply_chat_template: opt.ApplyChatTemplate = False,
    task_data: opt.TaskData = None,
    text: opt.Text = None,
    calibration: opt.Calibration = None,
    protocol: opt.Protocol = None,
    window: opt.Window = None,
    limit: opt.Limit = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    threads: opt.Threads = None,
    batch: opt.Batch = None,
    prompt_tokens: opt.PromptTokens = None,
    new_tokens: opt.NewTokens = None,
    rounds: opt.Rounds = None,
    conditions: opt.Conditions = None,
    dense_runs: opt.DenseRuns = None,
    timeout: opt.Timeout = None,
    seed: opt.Seed = None,
    out: opt.Out = None,
    html: opt.Html = None,
    allow_pickle: opt.AllowPickle = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Apply pipelines to a model, measure each, print a table. Run again to continue what was broken off.

    Several pipelines follow one --techniques: effbench run ref-1m --techniques rtn:bits=4 magnitude+rtn
    """
    from effbench.report.progress import progress_for
    from effbench.suite import ask

    question = ask(
        model,
        None if techniques is None else [word for words in techniques for word in words.split()],
        suite,
        tasks=tuple(name for names in tasks for name in names.split(",") if name) if tasks else None,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template or None,
        task_data=None if task_data is None else str(task_data),
        text=text,
        calibration=calibration,
        protocol=protocol,
        window=window,
        limit=limit,
        device=device,
        dtype=dtype,
        threads=threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        conditions=tuple(conditions.split(",")) if conditions else None,
        dense_runs=dense_runs,
        timeout_seconds=timeout,
        seed=seed,
        allow_pickle=allow_pickle or None,
        trust_remote_code=trust_remote_code or None,
    )
    from effbench import harness, results
    from effbench.measure.derived import rows as derive

    progress = progress_for(console(sys.stderr))
    try:
        folder = harness.run(question, out, progress)
    except KeyboardInterrupt:
        progress.stop()
        where = f"what is measured lies in {progress.out}, and the same command continues it"
        print(f"effbench: stopped; {where if progress.out else 'nothing was measured'}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        progress.stop()
    rows = derive(results.load_all(folder)[0])
    print_table(rows)
    print(f"\nrecords: {folder}  (effbench show {folder})")
    write_page(rows, html)
    if rows[0].record.pipeline == "dense" and rows[0].record.status != "ok":
        raise EffbenchError(f"the dense model could not be measured: {rows[0].record.reason}")


@app.command()
def apply(
    model: opt.Model,
    pipeline: opt.Pipeline,
    save: opt.Save,
    text: opt.Text = None,
    calibration: opt.Calibration = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    seed: opt.Seed = None,
    allow_pickle: opt.AllowPickle = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Take a compressed model home: apply a pipeline and save the result, which `run` accepts as a model."""
    from effbench import harness, models

    harness.apply_and_save(
        model,
        pipeline,
        save,
        text=text,
        calibration=calibration,
        dtype=dtype or "bfloat16",
        device=harness.resolve_device(device or "auto"),
        seed=seed or 0,
        trust=models.Trust(allow_pickle, trust_remote_code),
    )
    print(f"saved: {save}  (effbench run {save})")


@app.command(name="list")
def list_(kind: opt.Kind = "techniques", as_json: opt.Json = False) -> None:
    """List techniques, tasks, models or suites."""
    from effbench.report import listing

    if as_json:
        print_json(listing.listing(kind))
    else:
        listing.show(kind, console(sys.stdout))


@app.command()
def show(
    folder: opt.Folder,
    as_json: opt.Json = False,
    as_csv: opt.Csv = False,
    as_markdown: opt.Markdown = False,
    details: opt.Details = False,
    html: opt.Html = None,
) -> None:
    """Show what was measured."""
    if as_json + as_csv + as_markdown > 1:
        raise UsageError("--json, --csv and --markdown exclude each other; give one of them")
    from effbench import results
    from effbench.measure.derived import rows as derive

    records, errors = results.load_all(folder)
    rows = derive(records)
    if rows and as_json:
        from effbench.report.frame import row_dicts

        print_json(row_dicts(rows))
    elif rows and as_csv:
        from effbench.report.frame import frame

        frame(rows).to_csv(sys.stdout, index=False)
    elif rows and as_markdown:
        from effbench.report.markdown import markdown

        sys.stdout.write(markdown(rows))
    elif rows:
        print_table(rows, details)
    write_page(rows, html)
    for error in errors:
        print(f"effbench: {error}", file=sys.stderr)
    if errors:
        raise typer.Exit(2)


@app.command()
def compare(
    old: opt.Old,
    new: opt.New,
    speed: opt.Speed = 0.25,
    memory: opt.Memory = 0.25,
    nats: opt.Nats = 0.001,
    errors: opt.Errors = 3.0,
) -> None:
    """Name every column that got worse from one run to another; exit code 1 if there is one, 0 for noise."""
    from effbench.compare import Thresholds
    from effbench.compare import compare as find

    findings = find(old, new, Thresholds(speed=speed, memory=memory, nats=nats, errors=errors))
    for finding in findings:
        print(f"{'regression' if finding.is_regression else finding.better or 'note'}: {finding.sentence}")
    regressions = sum(finding.is_regression for finding in findings)
    print(f"{regressions} regression{'' if regressions == 1 else 's'}, {len(findings) - regressions} other changes")
    if regressions:
        raise typer.Exit(1)


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line, with `--model effbench` for a model after a pipeline.

    effbench lm-eval --model effbench --model_args pretrained=MODEL,techniques=gptq:bits=4 --tasks piqa
    """
    from effbench.lm_eval_model import hand_over

    hand_over(context.args)


@app.command()
def check(technique: opt.Technique, device: opt.Device = None) -> None:
    """Hold a technique against the contract that every technique must pass."""
    from effbench import contract, harness

    outcomes = contract.check(technique, device=harness.resolve_device(device or "auto"))
    for outcome in outcomes:
        state, said = ("failed", outcome.problem) if outcome.problem else ("ok", outcome.note)
        print(f"{state:<7} {outcome.name:<20} {said}".rstrip())
    if any(outcome.problem for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def doctor(as_json: opt.Json = False, measure: opt.Measure = False) -> None:
    """Say what this machine can run and measure, and what to install for more."""
    from effbench.measure.host import survey

    found = survey(measure)
    if as_json:
        print_json(found)
    else:
        from effbench.report import doctor as report

        report.show(found, console(sys.stdout))


def main(words: list[str] | None = None) -> int:
    """Run the command that the words ask for; the exit code. Whatever goes wrong becomes one sentence on stderr."""
    # transformers' own bars and warnings would stand between our lines
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")
    try:
        code = app(opt.spread(sys.argv[1:] if words is None else words), prog_name="effbench", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except EffbenchError as error:
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except WORDS as error:
        text = getattr(error, "format_message", error.__str__)()
        return _fail(f"{text.rstrip('.')} (effbench --help)", 2) if text else 2  # no words: the help was shown


def _fail(sentence: str, code: int) -> int:
    print(f"effbench: {' '.join(sentence.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
