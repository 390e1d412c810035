"""The command line, `delta-llava COMMAND ...`.

A command is a thin function: it states arguments and help, imports the function that does the work inside its body and
prints what that returns. Nothing here imports `modeling_delta_llava` outside of a body, since that brings in torch and
transformers: `--help` waits for neither. Errors that a user can act on are raised as `UserError`; `main` turns them
into one line and exit status 2.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import UserError, printable
from .read_ahead import read_ahead
from .redaction import scrub

# The sections of `delta-llava --help`. A command names its own, `@app.command(rich_help_panel=USE)`, and stands below
# among the others of that section: the help shows sections and commands in the order of this file.
USE = "Use"
CONVERT = "Convert"
PUBLISH = "Publish"
TRAIN = "Train"
MEASURE = "Measure"

TRACEBACK_VARIABLE = "DELTA_LLAVA_TRACEBACK"
EXIT_FAILED_CHECK = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# Typer's usage errors share this base class, which it does not export by name.
_CommandLineError = typer.BadParameter.__mro__[2]


class _Sections(TyperGroup):
    """A group whose help lists its commands by section (`rich_help_panel`), as plain text."""

    def format_commands(self, ctx, formatter) -> None:
        commands = [self.commands[name] for name in self.list_commands(ctx)]
        for section in dict.fromkeys(command.rich_help_panel for command in commands):
            members = [command for command in commands if command.rich_help_panel == section]
            with formatter.section(section):
                formatter.write_dl([(command.name, command.get_short_help_str(limit=400)) for command in members])


class _Budgets(TyperCommand):
    """A command that takes budgets with spaces between them too: `--num-visual-tokens 16 64 144`."""

    def parse_args(self, ctx, args):
        joined = []
        for argument in args:
            if argument.isdecimal() and joined[-2:-1] == ["--num-visual-tokens"]:
                joined[-1] += f",{argument}"
            else:
                joined.append(argument)
        return super().parse_args(ctx, joined)


app = typer.Typer(
    cls=_Sections,
    # Plain help: importing what renders it in colour would take longer than all the rest of `--help`.
    rich_markup_mode=None,
    name="delta-llava",
    help="Delta-LLaVA for Hugging Face transformers (unofficial).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version as installed_version

        typer.echo(f"delta-llava {installed_version('delta-llava')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option("--traceback", help=f"Show the Python traceback of an error (or set {TRACEBACK_VARIABLE}=1)."),
    ] = False,
) -> None:
    if traceback:
        context.obj["traceback"] = True


@app.command(rich_help_panel=USE)
def ask(
    model: Annotated[str, typer.Argument(help="Hub folder or id.")],
    images_and_question: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... QUESTION",
            help="Pictures and videos (paths or http addresses), then the question in quotes.",
        ),
    ],
    num_visual_tokens: Annotated[
        str | None, typer.Option(help="Budget of every image (36), or one for each (16,576).")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")] = "auto",
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames shown of each video, at most [8].")] = None,
) -> None:
    """Ask about pictures and videos, and stream the answer."""
    from modeling_delta_llava.asking import ask as ask_model

    *images, question = images_and_question
    ask_model(
        model, question, images, num_visual_tokens, revision, max_new_tokens, temperature, device, dtype, num_frames
    )


@app.command(rich_help_panel=USE)
def serve(
    model: Annotated[str, typer.Argument(help="Hub folder or id.")],
    host: Annotated[str, typer.Option(help="Address of this machine to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="How requests call the model; by default as MODEL.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of a request, in tokens.")] = 1024,
    allow_local_media: Annotated[
        Path | None, typer.Option(help="Folder whose pictures requests may name by path; by default none.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that requests must bring, or set DELTA_LLAVA_API_KEY.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Answer the requests of OpenAI's clients (/v1/chat/completions), one by one."""
    from modeling_delta_llava.serving.server import serve as serve_model

    serve_model(
        *(model, host, port, name, revision, max_new_tokens, allow_local_media, api_key_file, device, dtype),
        say=lambda line: typer.echo(line, err=True),
    )


@app.command("app", rich_help_panel=USE)
def show_app(
    model: Annotated[str, typer.Argument(help="Hub folder or id.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Open a page on this machine to chat with a model about pictures."""
    from functools import partial

    from modeling_delta_llava.evaluation.explain import draw_explanations
    from modeling_delta_llava.serving.app import run_app

    run_app(model, partial(draw_explanations, hirescam=True), revision, device, dtype, host, port)


@app.command(rich_help_panel=CONVERT)
def convert(
    source: Annotated[str, typer.Argument(help="Folder that training wrote, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Hub folder to write; appears when it is complete.")],
    base_model: Annotated[
        str | None, typer.Option(help="Language model (folder or Hub id) of a stage-1 or LoRA result.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Vision tower (folder or Hub id); wins over the one inside SOURCE.")
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="What SOURCE is, if not what is detected: stage2, stage1, lora, finetuned.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a SOURCE on the Hub.")] = None,
    dtype: Annotated[str, typer.Option(help="keep, bfloat16, float16 or float32.")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 5GB or 512MiB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUTPUT that holds a model.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert weights with NaN or infinity as they are.")
    ] = False,
    scan: Annotated[bool, typer.Option(help="Look for NaN and infinity while copying.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, write nothing.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on a terminal.")] = True,
) -> None:
    """Turn a checkpoint of Delta-LLaVA training into a Hub folder."""
    if not dry_run:
        read_ahead(source)

    from modeling_delta_llava.conversion.assemble import Options
    from modeling_delta_llava.conversion.convert import convert as convert_checkpoint
    from modeling_delta_llava.conversion.convert import preview
    from modeling_delta_llava.folders import format_bytes

    options = Options(form, base_model, vision_tower, revision, dtype)
    if dry_run:
        found, rows = preview(source, output, options, max_shard_size=max_shard_size, overwrite=overwrite)
        for line in found:
            typer.echo(line)
        _print_table(("", "would be written"), rows)
        return
    result = convert_checkpoint(
        source,
        output,
        options,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        scan=scan,
        progress=progress,
        say=lambda line: typer.echo(line, err=True),
    )
    rate = format_bytes(result.nbytes / max(result.seconds, 1e-9))
    typer.echo(f"wrote {result.output} ({format_bytes(result.nbytes)} of weights, {rate}/s)")


@app.command(rich_help_panel=CONVERT)
def export(
    folder: Annotated[str, typer.Argument(help="Hub folder or id.", metavar="HUB_FOLDER")],
    output: Annotated[Path, typer.Argument(help="Training folder to write; appears when it is complete.")],
    projector_only: Annotated[
        bool, typer.Option("--projector-only", help="Only what stage 1 writes: mm_projector.bin and config.json.")
    ] = False,
    vision_tower: Annotated[
        str | None, typer.Option(help="Tower to name in the training config; by default the converted one.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, for example 5GB or 512MiB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUTPUT that holds a model.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on a terminal.")] = True,
) -> None:
    """Turn a Hub folder into a checkpoint of Delta-LLaVA training again."""
    if not projector_only:
        read_ahead(folder)

    from modeling_delta_llava.conversion.export import export as export_folder

    result = export_folder(
        folder,
        output,
        projector_only=projector_only,
        vision_tower=vision_tower,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
        say=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"wrote {result.output}: {', '.join(path.name for path in result.files)}")


@app.command(rich_help_panel=CONVERT)
def verify(
    folder: Annotated[Path, typer.Argument(help="Hub folder.")],
    against: Annotated[str | None, typer.Option(help="Source to compare with: folder or Hub id.")] = None,
    base_model: Annotated[str | None, typer.Option(help="As given to convert.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="As given to convert.")] = None,
    form: Annotated[str | None, typer.Option(help="As given to convert.")] = None,
    revision: Annotated[str | None, typer.Option(help="As given to convert.")] = None,
    numbers: Annotated[bool, typer.Option(help="Load the model and look at its logits, when memory allows.")] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar on a terminal.")] = True,
) -> int:
    """Check a Hub folder: complete, loadable, and equal to its source. Exits with 1 if anything differs."""
    from modeling_delta_llava.conversion.assemble import Options
    from modeling_delta_llava.conversion.verify import passed
    from modeling_delta_llava.conversion.verify import verify as verify_folder

    options = Options(form, base_model, vision_tower, revision)
    checks = verify_folder(folder, against, options, numbers=numbers, progress=progress)
    marks = {True: "ok", False: "FAILED", None: "skipped"}
    _print_table(("check", "result", "detail"), [(check.name, marks[check.passed], check.detail) for check in checks])
    return 0 if passed(checks) else EXIT_FAILED_CHECK


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; one line per row, cells separated by tabs, when redirected."""
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


@app.command(rich_help_panel=PUBLISH)
def variants(
    name: Annotated[
        str | None, typer.Argument(help="Show this variant alone, with all that is known about it.")
    ] = None,
    benchmarks: Annotated[bool, typer.Option("--benchmarks", help="Show the scores of every benchmark.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: every figure with the table it is from.")
    ] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table with the scores of every benchmark.")
    ] = False,
) -> None:
    """List the variants of the paper and of the release, with the scores the paper's tables print for them."""
    import json

    from modeling_delta_llava.hub_cards import variants as listed

    if name is not None or as_json:
        records = [listed.variant_record(entry) for entry in listed.variants().values()]
        shown = records if name is None else listed.variant_record(listed.get_variant(name))
        typer.echo(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    columns = [*listed.benchmarks()] if benchmarks or as_markdown else listed.MAIN_BENCHMARKS
    head, rows = listed.variants_table(columns, sources=as_markdown)
    if as_markdown:
        typer.echo(listed.markdown(head, rows))
    else:
        _print_table(head, rows)


@app.command(rich_help_panel=PUBLISH)
def card(
    folder: Annotated[Path, typer.Argument(help="Hub folder to write the card into.")],
    variant: Annotated[
        str | None, typer.Option(help="The folder is this listed variant (see `delta-llava variants`).")
    ] = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository that the snippets load, NAMESPACE/NAME.")] = None,
    revision: Annotated[str, typer.Option(help="Tag that the snippets pin.")] = "v1.0",
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence identifier of the Hub; by default the variant's.")
    ] = None,
    licence_name: Annotated[str | None, typer.Option("--license-name", help="With `--license other`.")] = None,
    licence_link: Annotated[str | None, typer.Option("--license-link", help="With `--license other`.")] = None,
    base_model: Annotated[
        list[str] | None, typer.Option(help="Hub id this model derives from; repeat for several.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Result file of lmms-eval measured from this folder; repeat for several.")
    ] = None,
) -> None:
    """Write the model card: README.md, LICENSE, NOTICE, figure and evaluation results."""
    from modeling_delta_llava.hub_cards.card import write_card

    written = write_card(
        folder,
        variant=variant,
        repo_id=repo_id,
        revision=revision,
        licence=licence,
        licence_name=licence_name,
        licence_link=licence_link,
        base_models=base_model or (),
        results=results or (),
    )
    typer.echo(f"wrote {written}")


@app.command(rich_help_panel=PUBLISH)
def publish(
    folder: Annotated[Path | None, typer.Argument(help="Hub folder with a card.")] = None,
    repo_id: Annotated[str | None, typer.Argument(help="NAMESPACE/NAME on the Hub.")] = None,
    everything: Annotated[
        Path | None,
        typer.Option("--all", help="Publish every Hub folder in here, save those named _..., under its own name."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="With --all: user or organisation to publish under.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to commit to; made if need be.")] = "main",
    tag: Annotated[str | None, typer.Option(help="Tag to set on the commit once it has been checked.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    collection: Annotated[str | None, typer.Option(help="Title or slug of a collection to add it to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence identifier, for a card that states none.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of paths to leave out; repeatable.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Path of a file that is no usual part of a model; repeatable.")
    ] = None,
    refresh_code: Annotated[
        bool, typer.Option("--refresh-code", help="First write this release's code into the folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, send nothing.")] = False,
    load: Annotated[bool, typer.Option(help="Load the folder in a fresh process before publishing.")] = True,
) -> None:
    """Publish a folder on the Hub: checked before, sent in one commit that can be resumed, checked after."""
    from modeling_delta_llava.hub_cards.publish import PublishOptions, describe, publish_all, timed
    from modeling_delta_llava.hub_cards.publish import publish as publish_folder

    options = PublishOptions(
        private=private,
        revision=revision,
        tag=tag,
        create_pr=create_pr,
        collection=collection,
        message=message,
        licence=licence,
        exclude=tuple(exclude or ()),
        include=tuple(include or ()),
        refresh_code=refresh_code,
        dry_run=dry_run,
        load=load,
    )
    say = timed(lambda text: typer.echo(text, err=True))
    if everything is not None:
        if folder is not None or namespace is None:
            raise UserError("with --all give the folder of folders and --namespace NAME, and no other argument")
        for report in publish_all(everything, namespace, options, say):
            typer.echo(describe(report, dry_run))
        return
    if folder is None or repo_id is None:
        raise UserError("give a folder and NAMESPACE/NAME, or --all DIR --namespace NAME")
    typer.echo(describe(publish_folder(folder, repo_id, options, say), dry_run))


@app.command(rich_help_panel=PUBLISH)
def quantize(
    folder: Annotated[Path, typer.Argument(help="Hub folder with full weights.")],
    output: Annotated[Path, typer.Argument(help="New folder.")],
    bits: Annotated[int, typer.Option(help="4 (NF4) or 8 bits for the language model.")] = 4,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the full model; by default what its card's snippets load.")
    ] = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository that the new card's snippets load.")] = None,
    revision: Annotated[str, typer.Option(help="Tag that the new card's snippets pin.")] = "v1.0",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write a bitsandbytes copy: language model in 4 or 8 bit, vision tower and projector in 16 bit."""
    from modeling_delta_llava.hub_cards.quantize import quantize as quantize_folder

    written = quantize_folder(folder, output, bits, base_model, repo_id, revision, device)
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    typer.echo(f"wrote {written} ({size / 1e9:.3f} GB of weights)")


def _print_settings(requested: bool) -> None:
    if requested:
        from modeling_delta_llava.finetuning.arguments import SettingsParser

        typer.echo(SettingsParser().format_help())
        raise typer.Exit


@app.command(
    rich_help_panel=TRAIN,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def finetune(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(help="YAML file, or a packaged recipe such as vicuna-7b/stage1.", metavar="CONFIG.yaml")
    ],
    settings: Annotated[
        bool, typer.Option("--help", "-h", "--list-settings", callback=_print_settings, is_eager=True)
    ] = False,
) -> None:
    """Train, as a YAML file and overrides say: CONFIG.yaml [--key value ...] [--check-data].

    `--help` prints every setting, those of transformers.TrainingArguments among them.
    """
    from modeling_delta_llava.finetuning.run import finetune as run_finetuning

    folder = run_finetuning(config, context.args)
    if folder is not None:
        typer.echo(f"wrote {folder}")


@app.command(rich_help_panel=MEASURE)
def profile(
    model_or_variant: Annotated[
        str, typer.Argument(help="Hub folder, repository, or a variant's name (see `delta-llava variants`).")
    ],
    num_visual_tokens: Annotated[
        str | None, typer.Option(help="Budgets, comma-separated, e.g. 576,144,36; by default every legal one.")
    ] = None,
    analytic: Annotated[
        bool, typer.Option("--analytic", help="Count only: needs no weights, measures nothing.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Measure with random weights of this geometry.")
    ] = False,
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of the prompt; 68 as in the paper.")] = 68,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated tokens; 30 as in the paper.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the requests/s measurement.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each measurement; medians are shown.")] = 5,
    device: Annotated[str | None, typer.Option(help="Torch device; by default the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default as stored.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this JSON file.")] = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", help="Draw FLOPs by component and tokens/s into this PNG file.")
    ] = None,
) -> None:
    """Show what every visual-token budget costs: FLOPs, cache and parameters, latency, tokens/s and memory."""
    from modeling_delta_llava.asking import parse_budgets
    from modeling_delta_llava.evaluation import backbones, efficiency
    from modeling_delta_llava.hub_cards.variants import variants

    budgets = parse_budgets(num_visual_tokens)
    variant = variants().get(model_or_variant)
    if variant is not None:
        config = backbones.known_config(variant.backbone.id, variant.tower.id, variant.num_visual_tokens)
        if not (analytic or random_weights):
            raise UserError(
                f"{model_or_variant} is a variant, not a folder with weights to measure: add --analytic to count, "
                "--random-weights to measure its geometry, or name a folder or repository"
            )
    else:
        config = efficiency.read_config(model_or_variant)
    document = efficiency.profile(
        config,
        name=model_or_variant,
        weights=None if analytic else ("random" if random_weights else model_or_variant),
        budgets=budgets,
        text_tokens=text_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        device=device,
        dtype=dtype,
        json_file=json_file,
        png_file=png_file,
    )
    efficiency.print_table(document)


@app.command(rich_help_panel=MEASURE, cls=_Budgets)
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub folder or id.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks of lmms-eval, comma-separated; `paper` stands for the ten of the paper.")
    ] = "paper",
    num_visual_tokens: Annotated[
        str | None, typer.Option(help="Budgets, e.g. 576,144,36,1; by default the model's own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of answers and results; by default NAME-evaluation.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for one page with scores, tokens/s and TFLOPs, beside the paper's.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant to compare with; by default the one that the model's card names.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further tasks (lmms-eval's YAML).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task; by default all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Score a model with lmms-eval at several budgets, beside the paper; a killed run goes on where it was."""
    from modeling_delta_llava.asking import model_folder, parse_budgets
    from modeling_delta_llava.evaluation import efficiency
    from modeling_delta_llava.evaluation.evaluate import evaluate as evaluate_model
    from modeling_delta_llava.evaluation.evaluate import is_first_process
    from modeling_delta_llava.hub_cards import report as reports
    from modeling_delta_llava.hub_cards.variants import paper_tasks

    budgets = parse_budgets(num_visual_tokens)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    names = [task for name in names for task in (paper_tasks() if name == "paper" else [name])]
    output = output or Path(f"{Path(model).resolve().name}-evaluation")
    compared = reports.prepare(model, revision, variant, report, output)
    files = evaluate_model(
        model,
        list(dict.fromkeys(names)),
        output,
        budgets=budgets,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        revision=revision,
        device=device,
        dtype=dtype,
        say=lambda line: typer.echo(line, err=True) if is_first_process() else None,
    )
    if not files:
        return
    measured = reports.read_results(files, compared)
    if not measured:
        typer.echo(f"wrote {files[0].parent}; no task gives a score here, what their test servers take is in {output}")
        return
    _print_table(*reports.table(measured))
    reports.write_figure(measured, files[0].parent)
    typer.echo(f"wrote {files[0].parent}")
    if report is not None:
        typer.echo(f"measuring speed for {report}", err=True)
        with reports.new_page(report) as building:
            folder = str(model_folder(model, revision))
            document = efficiency.profile(
                efficiency.read_config(folder),
                name=Path(model).resolve().name,
                weights=folder,
                budgets=[entry.tokens for entry in measured],
                device=device,
                dtype=None if dtype == "auto" else dtype,
                png_file=building / reports.COST,
            )
            reports.write_page(building, files, measured, compared, efficiency.cost_rows(document))
        typer.echo(f"wrote {report}")


@app.command(rich_help_panel=MEASURE, cls=_Budgets)
def explain(
    model: Annotated[str, typer.Argument(help="Hub folder or id.")],
    image: Annotated[str, typer.Argument(help="Picture (path or http address).")],
    question: Annotated[str, typer.Argument(help="Question in quotes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to draw the sheet into.")],
    num_visual_tokens: Annotated[
        str | None, typer.Option(help="Budgets (16 64 144); by default those three, where the patch grid allows them.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Explain this word of the answer alone.")] = None,
    hirescam: Annotated[
        bool, typer.Option("--hirescam", help="Draw HiResCAM, whose heat lies closer to its cause, not Grad-CAM.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a MODEL on the Hub.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")] = "auto",
) -> None:
    """Draw where a model looks when it answers: heat maps at several budgets, and what each visual token reads."""
    from modeling_delta_llava.evaluation.explain import explain_to_file

    for explanation in explain_to_file(
        model, image, question, output, num_visual_tokens, token, revision, max_new_tokens, device, dtype, hirescam
    ):
        typer.echo(f"{explanation.num_visual_tokens}: {explanation.answer}")
    typer.echo(f"wrote {output}")


def _one_line(error: BaseException) -> str:
    """What went wrong, as one line: an `OSError` names its file, a usage error the help to read."""
    if isinstance(error, _CommandLineError):
        message = error.format_message()
        context = getattr(error, "ctx", None)
        if context is not None:
            message = f"{message.rstrip('.')} (see '{context.command_path} --help')"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        message = f"{error.strerror}: {os.fspath(error.filename)}"
    else:
        message = str(error) or type(error).__name__
    return scrub(printable(message, None))


def _open_streams() -> None:
    """Has standard streams that the shell closed (`>&-`) lead nowhere, and writes what they cannot encode escaped."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 - it stays open
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Keeps Python from failing once more when it flushes standard output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 1 (a check failed), 2 (to be mended), 130 (interrupted).

    Args:
        arguments: what follows `delta-llava`; by default the process's own arguments.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    settings = {"traceback": os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")}
    try:
        status = app(args=list(arguments) or ["--help"], prog_name="delta-llava", standalone_mode=False, obj=settings)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone.
        _discard_output()
        return 1
    except (KeyboardInterrupt, typer.Abort):
        if settings["traceback"]:
            raise
        status = EXIT_INTERRUPTED
    except (UserError, OSError, _CommandLineError) as error:
        if settings["traceback"]:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        status = EXIT_USER_ERROR
        try:
            sys.stdout.flush()
        except OSError:  # the error just printed, of a disk that is full
            _discard_output()
    if status == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0
