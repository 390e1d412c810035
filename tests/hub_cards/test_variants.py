"""The published figures: transcribed once, consistent with themselves and with the paper where its text is at hand."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from delta_llava import cli
from delta_llava.errors import UserError
from modeling_delta_llava.hub_cards import variants as module
from modeling_delta_llava.hub_cards.variants import MISSING, PARTS, get_variant, paper_tables, variants

REPOSITORY = Path(module.__file__).resolve().parent.parent
NUMBER = re.compile(r"\d+(\.\d+)?")


def paper_text() -> str:
    """The paper as Markdown: $DELTA_LLAVA_PAPER, or ../shared/paper beside the checkout."""
    path = Path(os.environ.get("DELTA_LLAVA_PAPER") or REPOSITORY.parent / "shared/paper/delta-llava.md")
    if not path.is_file():
        pytest.skip("the paper's text is not here: set DELTA_LLAVA_PAPER to check the transcription against it")
    return path.read_text(encoding="utf-8")


def printed_tables() -> dict[str, list[list[str]]]:
    """The paper's tables by number, as lists of cells, told apart by their header cells."""
    blocks, current = [], []
    for line in [*paper_text().splitlines(), ""]:
        if "\t" in line:
            current.append([cell.strip() for cell in re.sub(r"</?[bu]>", "", line).split("\t")])
        elif current:
            blocks.append(current)
            current = []
    numbers = {}
    for block in blocks:
        head = block[0]
        if head[0] == "Method":
            numbers["1" if "TextVQA" in head else "2"] = block
        elif head[0] == "Model":
            numbers["4" if "Pretraining" in head else "3"] = block
        elif head[0] == "Vision Tower":
            numbers["5"] = block
        elif head[0] == "# Tokens":
            numbers["6"] = block
    return numbers


@pytest.mark.parametrize("number", ["1", "2", "3", "4", "5"])
def test_transcription_equals_the_printed_table(number):
    printed = printed_tables()[number]
    table = paper_tables()[number]
    renamed = {"Method": "method", "Model": "method", "Vision Tower": "method", "# Token": "tokens"}
    assert list(table.columns) == [renamed.get(head, head.lower() if number == "4" else head) for head in printed[0]]
    assert [list(row.cells.values()) for row in table.rows] == printed[1:]


def test_transcription_equals_the_printed_caption_table():
    table = paper_tables()["6"]
    rebuilt = []
    for tokens in dict.fromkeys(row.tokens for row in table.rows):
        cells = [tokens]
        for size in ("7B", "13B"):
            for benchmark in ("Nocaps", "Flickr30k"):
                cells += [table.row(f"{method} {size}", tokens).cells[benchmark] for method in ("FastV", "Ours")]
        rebuilt.append(cells)
    assert rebuilt == printed_tables()["6"][3:]


def test_rates_are_those_the_text_spells_out():
    text = paper_text().replace("$", "").replace("\\leq ", "≤")
    for row in paper_tables()["Figure 3"].rows:
        for name, value in row.cells.items():
            if name != "tokens" and value != MISSING:
                assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", text), f"{name} {value} at {row.tokens}"


def test_tables_are_complete():
    tables = paper_tables()
    assert set(tables) == {"1", "2", "3", "4", "5", "6", "Figure 3"}
    assert {name: len(table.rows) for name, table in tables.items()} == {
        "1": 26, "2": 3, "3": 4, "4": 6, "5": 3, "6": 28, "Figure 3": 6,
    }  # fmt: skip
    for table in tables.values():
        keys = [tuple(row.cells[column] for column in table.key) for row in table.rows]
        assert len(set(keys)) == len(keys), table.name
        for row in table.rows:
            for name, text in row.scores.items():
                if table.name == "4":
                    assert re.fullmatch(r"\d:\d\d:\d\d", text)
                elif table.name != "Figure 3":
                    assert NUMBER.fullmatch(text), (table.name, name, text)


def test_tables_agree_with_each_other():
    """Where two tables print the same measurement they agree, to the precision of the coarser one."""
    full, ablation = paper_tables()["1"].row("Delta-LLaVA (Ours)", 144), paper_tables()["3"].row("Full Model")
    for name, text in ablation.scores.items():
        decimals = len(full.scores[name].partition(".")[2])
        assert round(float(text), decimals) == float(full.scores[name]), name
    captions = paper_tables()["6"]
    for size in ("7B", "13B"):
        assert captions.row(f"FastV {size}", 576).scores == captions.row(f"Ours {size}", 576).scores


def test_every_variant_of_paper_and_release_is_listed():
    listed = {(v.backbone.id, v.tower.id, v.num_visual_tokens) for v in variants().values()}
    clip = "openai/clip-vit-large-patch14-336"
    expected = {("lmsys/vicuna-7b-v1.5", clip, tokens) for tokens in (576, 144, 64, 36, 16, 4, 1)}
    expected |= {("lmsys/vicuna-13b-v1.5", clip, tokens) for tokens in (576, 144, 64, 36, 16, 4, 1)}
    expected |= {("Qwen/Qwen2.5-7B-Instruct", clip, tokens) for tokens in (144, 36)}
    expected |= {
        ("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14", 64),
        ("lmsys/vicuna-7b-v1.5", "google/siglip-so400m-patch14-384", 81),
        ("NousResearch/Hermes-4.3-36B", clip, 144),
    }
    assert listed == expected
    assert len(listed) == len(variants())


def test_every_row_about_delta_llava_belongs_to_a_variant():
    used = {(row.table, row.method, row.tokens) for v in variants().values() for row in v.rows}
    for name in ("1", "2", "6"):
        for row in paper_tables()[name].rows:
            if (row.method.startswith(("Delta-LLaVA", "Ours"))) and row.tokens != "576":
                assert (row.table, row.method, row.tokens) in used
    assert {row.method for v in variants().values() for row in v.rows if row.table == "5"} == {
        "CLIP 336", "CLIP 224", "SigLIP 386",
    }  # fmt: skip


def test_scores_are_for_the_variants_own_budget_and_language_model():
    for variant in variants().values():
        size = "13B" if "13b" in variant.name else "7B"
        for row in variant.rows:
            assert row.tokens == str(variant.num_visual_tokens)
            if row.table == "6":
                assert row.method == f"Ours {size}"
            if row.table == "1":
                assert ("13B" in row.method) == (size == "13B")
            assert (row.table == "2") == variant.name.startswith("delta-llava-qwen")
        for row in variant.baselines:
            assert not row.method.startswith(("Delta-LLaVA", "Ours"))
        benchmarks = [score.benchmark for score in variant.scores]
        assert len(set(benchmarks)) == len(benchmarks)
        assert set(benchmarks) <= set(module.benchmarks())


def test_no_published_score_at_576_tokens():
    full = [variant for variant in variants().values() if variant.num_visual_tokens == 576]
    assert len(full) == 2
    for variant in full:
        assert variant.scores == ()
        assert variant.training_time is None
        assert variant.rates is None
        assert "no score of a Delta projector at 576 tokens" in variant.note


def test_budgets_are_legal():
    for variant in variants().values():
        grid = variant.tower.shape["image_size"] // variant.tower.shape["patch_size"]
        side = round(variant.num_visual_tokens**0.5)
        assert side * side == variant.num_visual_tokens
        assert grid % side == 0


def test_provenance_and_licence_of_every_variant():
    for variant in variants().values():
        assert set(variant.provenance) == set(PARTS)
        assert set(variant.provenance.values()) <= {"released", "reconstructed", "ours"}
        if "vicuna" in variant.name:
            assert variant.licence == {"license": "llama2"}
    released = [v for v in variants().values() if v.provenance["weights"] == "released"]
    assert [v.weights_source for v in released] == ["mzamini/DeltaLLaVA-36B-144"]
    assert released[0].licence == {}, "the authors state no licence for their weights"
    assert get_variant("delta-llava-qwen2.5-7b-36").licence["license"] == "apache-2.0"


def test_figures_are_written_in_one_place_only():
    """No figure of the paper stands in the other files of hub_cards (code, template, variants)."""
    figures = {
        text
        for table in paper_tables().values()
        for row in table.rows
        for text in row.scores.values()
        if re.fullmatch(r"\d{2,4}\.\d+", text)
    }
    assert len(figures) > 200
    for path in module.FOLDER.rglob("*"):
        if path.suffix not in (".py", ".md", ".yaml") or path.name == "paper_tables.yaml" or "licenses" in path.parts:
            continue
        if path.suffix == ".yaml":
            import yaml

            content = json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))["variants"])
        else:
            content = path.read_text(encoding="utf-8")
        found = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", content)) & figures
        assert not found, (path.name, found)


def test_the_page_about_the_paper_quotes_the_ablations_as_printed():
    table = paper_tables()["3"]
    text = module.markdown(table.columns, [[*row.cells.values()] for row in table.rows])
    assert text in (REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8")


def test_unknown_variant_is_one_line_with_a_hint():
    with pytest.raises(UserError, match="did you mean delta-llava-vicuna-7b-144") as caught:
        get_variant("delta-llava-vicuna-7b-114")
    assert "\n" not in str(caught.value)


def test_cli_prints_every_variant_and_its_scores(capsys):
    assert cli.main(["variants", "--markdown"]) == 0
    printed = capsys.readouterr().out
    for variant in variants().values():
        line = next(line for line in printed.splitlines() if f" {variant.name} " in line)
        cells = [cell.strip() for cell in line.split("|")]
        for score in variant.scores:
            assert score.text in cells
            assert score.source in cells[-2]


@pytest.mark.parametrize(("options", "width"), [([], 80), (["--benchmarks"], 200)])
def test_cli_prints_a_table_that_fits_a_terminal(options, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["variants", *options]) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == len(variants()) + 4, "no row wraps"
    for variant in variants().values():
        line = next(line for line in lines if f" {variant.name} " in line)
        assert all(score.text in line for score in variant.scores if options or score.benchmark in ("GQA", "POPE"))


def test_cli_prints_json_with_the_table_of_each_score(capsys):
    assert cli.main(["variants", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(entries) == set(variants())
    entry = entries["delta-llava-vicuna-7b-144"]
    row = paper_tables()["1"].row("Delta-LLaVA (Ours)", 144)
    assert {"benchmark": "GQA", "value": row.cells["GQA"], "source": "Table 1"} in entry["scores"]
    assert entry["training_time"] == {"pretraining": "0:33:32", "finetuning": "3:21:37", "source": "Table 4"}
    assert entry["provenance"]["weights"] == "reconstructed"


def test_cli_names_an_unknown_variant(capsys):
    assert cli.main(["variants", "no-such-variant"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: no variant is called 'no-such-variant'")
    assert printed.count("\n") == 1
