"""Cards: valid on the Hub, true to the paper's tables, and nothing invented about folders that are no variant."""

import ast
import io
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from delta_llava.errors import UserError
from modeling_delta_llava import card as card_module
from modeling_delta_llava.card import PAPER, Facts, render, state_of
from modeling_delta_llava.hub_cards.card import paper_results, variant_sections, write_card
from modeling_delta_llava.hub_cards.contents import list_files
from modeling_delta_llava.hub_cards.figure import chart_for, draw_chart
from modeling_delta_llava.hub_cards.licences import LLAMA_2_NOTICE, licence_text
from modeling_delta_llava.hub_cards.measured import _dataset_of
from modeling_delta_llava.hub_cards.metadata import card_problems as problems_of_card
from modeling_delta_llava.hub_cards.metadata import metadata_problems
from modeling_delta_llava.hub_cards.variants import get_variant, paper_tables, variants
from tests.hub_cards.conftest import assert_one_line

NAMES = list(variants())


def variant_config(variant) -> dict:
    """The part of config.json that a variant fixes."""
    return {
        "num_visual_tokens": variant.num_visual_tokens,
        "trained_num_visual_tokens": [variant.num_visual_tokens],
        "vision_config": dict(variant.tower.shape),
        "text_config": dict(variant.backbone.shape),
    }


def card_of(name: str, **changes) -> ModelCard:
    variant = get_variant(name)
    facts = {
        "name": name,
        "repo_id": f"user/{name}",
        "revision": "v1.0",
        "config": variant_config(variant),
        "variant": name,
        "licence": variant.licence,
        "base_models": (variant.backbone.id, variant.tower.id),
        "datasets": variant.recipe.datasets,
        "languages": variant.backbone.language,
    }
    results = [old for old, _ in paper_results(variant)]
    return render(Facts(**{**facts, **changes}), results, **variant_sections(variant))


def card_problems(folder) -> list[str]:
    return problems_of_card(folder, list_files(folder))


def tables_in(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a card as lists of rows of cells, bold marks removed."""
    tables, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
        elif current:
            tables.append(current)
            current = []
    return tables


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_valid_and_complete(name):
    variant, card = get_variant(name), card_of(name)
    data = ModelCard(str(card)).data.to_dict()
    assert metadata_problems(data) == []
    assert data["base_model"] == [variant.backbone.id, variant.tower.id]
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["library_name"] == "transformers"
    assert "arxiv:2512.18910" in data["tags"]
    assert data["datasets"] == list(variant.recipe.datasets)
    assert data["language"] == ["en"]
    assert data.get("license") == variant.licence.get("license")


def test_every_card_passes_the_hubs_validation(as_client):
    """What the real client does with a README.md before a commit, answered by the loopback Hub."""
    broken = card_of(NAMES[1], licence={"license": "llama-2"})

    def validate() -> int:
        for name in NAMES:
            card_of(name).validate()
        with pytest.raises(ValueError, match="license"):
            broken.validate()
        return 0

    as_client(validate)


@pytest.mark.parametrize("name", NAMES)
def test_every_score_of_the_card_is_a_cell_of_its_table(name):
    variant, card = get_variant(name), card_of(name)
    for source, table in re.findall(
        r"^(?:LLaVA-1.5 for comparison, )?(Table \d) of the paper:\n\n((?:\|.*\n)+)", card.text, re.MULTILINE
    ):
        header, _, *rows = tables_in(table)[0]
        printed = paper_tables()[source.removeprefix("Table ")]
        for row in rows:
            cells = dict(zip(header, row, strict=True))
            scores = {key: value for key, value in cells.items() if key not in ("method", "visual tokens")}
            assert any(
                entry.tokens == cells["visual tokens"]
                and all(entry.cells.get(key, "–") == value for key, value in scores.items())
                for entry in printed.rows
            ), (source, cells)
        assert rows[-1][1] == str(variant.num_visual_tokens) or [row[1] for row in rows] == ["576"]
    for score in variant.scores:
        assert f"**{score.text}**" in card.text


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_paper_say_so_everywhere(name):
    variant, card = get_variant(name), card_of(name)
    results = card.data.eval_results or []
    assert {(r.metric_value, r.source_name) for r in results} == {
        (score.value, f"Delta-LLaVA paper, {score.source}") for score in variant.scores
    }
    assert all(result.source_url == PAPER["url"] for result in results)
    assert all("reported by the paper" in result.metric_name for result in results)
    if variant.scores:
        assert "were not measured from the weights in this repository" in card.text


@pytest.mark.parametrize("name", NAMES)
def test_card_says_what_it_is(name):
    variant, text = get_variant(name), card_of(name).text
    assert "**Unofficial.**" in text
    assert PAPER["code"] in text
    assert PAPER["url"] in text
    assert "arxiv.org/abs/2604.14044" in text
    for part, origin in variant.provenance.items():
        assert re.search(rf"\| {part.replace('_', ' ')} \| \*\*{origin}\*\*", text)
    for heading in ("Usage", "Training", "Intended use and limits", "Licence", "Citation"):
        assert f"\n## {heading}\n" in text
    assert "{{" not in text
    assert "None" not in re.sub(r"^None have been published.*$", "", text, flags=re.MULTILINE)


def test_full_grid_card_has_no_score_of_its_own():
    card = card_of("delta-llava-vicuna-7b-576")
    assert card.data.eval_results is None
    assert "None have been published for this model." in card.text
    assert "LLaVA-1.5 for comparison, Table 1 of the paper:" in card.text
    assert card.text.index("## Scores") < card.text.index("![GQA") < card.text.index("## Training")
    table = next(t for t in tables_in(card.text) if t[0][0] == "method")
    assert [row[0] for row in table[2:]] == ["LLaVA-1.5"]


def test_released_weights_have_no_licence_until_one_is_stated():
    name = "delta-llava-hermes-4.3-36b-144"
    card = card_of(name)
    assert "license" not in card.data.to_dict()
    assert "The authors of [mzamini/DeltaLLaVA-36B-144]" in card.text
    assert "state no licence for these weights" in card.text
    stated = card_of(name, licence={"license": "apache-2.0"})
    assert stated.data.license == "apache-2.0"


def test_every_snippet_parses_and_is_pinned():
    for name in NAMES:
        text = card_of(name).text
        snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(snippets) == 5
        for snippet in snippets:
            ast.parse(snippet)
            assert f'model_id = "user/{name}"\nrevision = "v1.0"\n' in snippet
        state = state_of(card_of(name).data.to_dict())
        assert state == {"repo_id": f"user/{name}", "revision": "v1.0", "variant": name}


@pytest.mark.parametrize("name", NAMES)
def test_figure_is_drawn_from_the_tables(name):
    variant = get_variant(name)
    chart = chart_for(variant)
    if "hermes" in name:
        assert chart is None
        return
    known = {
        (row.tokens, float(text))
        for table in paper_tables().values()
        for row in table.rows
        for benchmark, text in row.scores.items()
        if benchmark == chart.benchmark
    }
    for series in chart.series:
        assert {(str(tokens), score) for tokens, score in series.points} <= known
        assert 576 not in dict(series.points), "576 tokens are LLaVA-1.5's own"
    if variant.scores:
        assert chart.marked[0] == variant.num_visual_tokens
        assert chart.marked[1] in {score.value for score in variant.scores}
    else:
        assert chart.marked is None
    with Image.open(io.BytesIO(draw_chart(chart))) as image:
        assert image.size == (960, 540)
        assert image.format == "PNG"
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**20)}
    assert (0xC2, 0x41, 0x0C) in colours, "the line of Delta-LLaVA"
    assert (255, 255, 255) in colours


def test_example_drawing():
    with Image.open(card_module.EXAMPLE) as image:
        assert image.size == (336, 336)
        assert image.convert("RGB").getpixel((70, 80)) == (0xDC, 0x26, 0x26)
        assert image.convert("RGB").getpixel((90, 240)) == (0x25, 0x63, 0xEB)


def variant_folder(folder, name: str):
    """A folder that has a variant's config and nothing else; enough for its card."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "delta_llava", **variant_config(get_variant(name))}))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_variants_folder_gets_a_valid_card(name, tmp_path):
    folder = variant_folder(tmp_path / "folder", name)
    write_card(folder, variant=name, repo_id=f"user/{name}")
    assert card_problems(folder) == []
    variant = get_variant(name)
    assert (folder / "scores.png").exists() == (chart_for(variant) is not None)
    results = folder / ".eval_results" / "paper.yaml"
    assert results.exists() == bool(variant.scores)
    if variant.scores:
        entries = parse_eval_result_entries(yaml.safe_load(results.read_text(encoding="utf-8")))
        assert [entry.value for entry in entries] == [score.value for score in variant.scores]
        assert all(entry.notes.endswith("not measured from these weights") for entry in entries)
    if variant.licence:
        assert (folder / "LICENSE").read_text(encoding="utf-8") == licence_text(variant.licence["license"])
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    assert variant.backbone.id in notice
    assert variant.tower.id in notice
    assert (LLAMA_2_NOTICE in notice) == (variant.licence.get("license") == "llama2")


def test_folder_of_another_shape_is_not_that_variant(hub_folder):
    with pytest.raises(UserError, match=r"is not delta-llava-vicuna-7b-144: text_config.hidden_size is 32"):
        write_card(hub_folder, variant="delta-llava-vicuna-7b-144")


# Folders that are no listed variant.


def test_card_of_a_finetune_invents_nothing(model_folder):
    (model_folder / "trainer_state.json").write_text(
        json.dumps({"global_step": 1200, "epoch": 2.0, "log_history": [{"loss": 1.25, "step": 1200}]})
    )
    write_card(model_folder, repo_id="user/mine", licence="mit")
    assert card_problems(model_folder) == []
    card = ModelCard.load(model_folder / "README.md")
    data = card.data.to_dict()
    for field in ("base_model", "base_model_relation", "datasets", "language", "model-index"):
        assert field not in data
    assert "Steps 1,200 of 0, epoch 2.00." in card.text
    assert "| 1200 | 1.2500 |  |" in card.text
    assert "llama, 2 layers of width 32" in card.text
    for figure in ("Vicuna", "CC-558K", "665K", "GQA", "released**", "H100"):
        assert figure not in card.text
    printed = {text for v in variants().values() for row in v.rows for text in row.scores.values() if "." in text}
    assert not printed & set(re.findall(r"\d+\.\d+", card.text))
    assert not (model_folder / ".eval_results").exists()
    assert not (model_folder / "scores.png").exists()


def test_card_of_a_folder_without_any_record(model_folder):
    write_card(model_folder)
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    assert "This folder holds no record of its training." in text
    assert "YOUR_NAME/tiny-delta-llava" in text


def test_training_of_our_finetuning_is_kept_in_the_metadata(model_folder):
    training = {
        "started_from": {"model": "user/base"},
        "data": "user/data",
        "rows": "10",
        "format": "template",
        "num_visual_tokens": [4],
        "parts": [["projector", 10, 0]],
        "settings": {"seed": 1},
        "step": 2,
        "steps": 2,
        "epoch": 1.0,
        "losses": [[1, 2.0, None], [2, 1.5, None]],
    }
    config = json.loads((model_folder / "config.json").read_text())
    facts = Facts("x", config, base_models=("user/base",), datasets=("user/data",), training=training)
    card = render(facts)
    card.data["license"] = "mit"
    card.text += "\nwritten by hand\n"
    card.save(model_folder / "README.md")
    for _ in range(2):
        write_card(model_folder, repo_id="user/mine")
        card = ModelCard.load(model_folder / "README.md")
        assert "Started from model `user/base`." in card.text
        assert "| 2 | 1.5000 |  |" in card.text
        assert "written by hand" not in card.text
        assert state_of(card.data.to_dict())["training"] == training
        assert card.data.base_model == "user/base"
        assert card.data.datasets == ["user/data"]
        assert card.data.license == "mit"


def test_training_that_is_none_is_one_line(model_folder):
    (model_folder / "README.md").write_text("---\ndelta_llava: {training: {settings: 3, parts: 4}}\n---\n")
    with pytest.raises(UserError, match="delete `delta_llava` from the metadata"):
        write_card(model_folder)


def test_writing_a_card_twice_changes_nothing(model_folder):
    write_card(model_folder, repo_id="user/mine", licence="apache-2.0")
    before = {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()}
    write_card(model_folder, repo_id="user/mine")
    assert {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()} == before


def lmms_eval_file(path, task="gqa", value=0.5125):
    results = {task: {"alias": task, "exact_match,none": value, "exact_match_stderr,none": 0.01, "samples": 10}}
    path.write_text(json.dumps({"results": results, "config": {"model_args": "pretrained=x,num_visual_tokens=1"}}))
    return path


def test_measured_scores_carry_their_source_file(model_folder, tmp_path):
    file = lmms_eval_file(tmp_path / "20260102_030405_results.json")
    write_card(model_folder, repo_id="user/mine", licence="mit", results=[file])
    assert card_problems(model_folder) == []
    card = ModelCard.load(model_folder / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == 0.5125
    assert result.source_url.endswith("user/mine/blob/v1.0/eval/20260102_030405_results.json")
    assert "measured from this repository" in result.metric_name
    assert "| gqa | exact_match | 0.5125 | 1 | [eval/20260102_030405_results.json]" in card.text
    (entry,) = parse_eval_result_entries(yaml.safe_load((model_folder / ".eval_results/measured.yaml").read_text()))
    assert (entry.dataset_id, entry.value, entry.date) == ("lmms-lab/GQA", 0.5125, "2026-01-02")
    assert (model_folder / "eval" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("task", ["my_task", "gqa_ru", "mmbench_ru_dev", "mme_realworld", "pope_adv", "GQA"])
def test_measured_score_of_an_unknown_task_is_in_the_card_alone(model_folder, tmp_path, task):
    """As it is called: a name that begins like a benchmark's is none."""
    write_card(model_folder, results=[lmms_eval_file(tmp_path / "a_results.json", task=task)])
    card = ModelCard.load(model_folder / "README.md")
    assert f"| {task} | exact_match |" in card.text
    assert card.data.eval_results[0].dataset_type == task
    assert not (model_folder / ".eval_results").exists()


@pytest.mark.parametrize(("task", "dataset"), [("vizwiz_vqa_val", "lmms-lab/VizWiz-VQA"), ("gqa", "lmms-lab/GQA")])
def test_exact_task_names_have_their_data_set(task, dataset):
    assert _dataset_of(task) == dataset


def test_card_killed_half_way_leaves_what_the_next_one_replaces(model_folder):
    (model_folder / ".README.md.unfinished").write_text("---\nlic")
    write_card(model_folder, repo_id="user/mine", licence="mit")
    assert not list(model_folder.rglob("*.unfinished"))
    assert card_problems(model_folder) == []


def test_a_file_that_is_no_result_file_is_one_line(cli, model_folder, tmp_path):
    (tmp_path / "x.json").write_text("[]")
    line = assert_one_line(cli("card", model_folder, "--results", tmp_path / "x.json"), "no result file of lmms-eval")
    assert "*_results.json" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--license", "llama-2"], "'llama-2' is no licence identifier"),
        (["--license", "other"], "needs license_name and license_link"),
        (["--license", "unknown"], "is no licence identifier"),
        (["--repo-id", "not a name"], "'not a name' is no repository name"),
        (["--base-model", "a/b/c"], "'a/b/c' is no repository name"),
        (["--revision", 'v"1'], "cannot name a tag"),
        (["--variant", "delta-llava-7b"], "no variant is called"),
        (["--variant", "delta-llava-qwen2.5-7b-36"], "is not delta-llava-qwen2.5-7b-36"),
    ],
)
def test_command_refuses_in_one_line(cli, model_folder, arguments, expected):
    assert_one_line(cli("card", model_folder, *arguments), expected)
    assert not (model_folder / "README.md").exists()


def test_command_refuses_other_folders(cli, tmp_path):
    assert_one_line(cli("card", tmp_path / "nowhere"), "config.json is missing")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert_one_line(cli("card", tmp_path), "is not a Delta-LLaVA config")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]", "does not hold a JSON object"),
        ("{", "is not valid JSON"),
        ('{"model_type": "delta_llava", "num_visual_tokens": 4, "vision_config": [], "text_config": {}}', "is not a"),
    ],
)
def test_broken_configs_are_one_line(tmp_path, content, expected):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        write_card(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_named(model_folder):
    (model_folder / "model.safetensors").write_text("xx")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        write_card(model_folder)


def test_template_holds_no_leftover_names():
    template = card_module.TEMPLATE.read_text(encoding="utf-8")
    assert template.startswith("---\n{{ card_data }}\n---\n")
