"""The ready recipes: each loads, reads its hub set's form, says what the estimator says; two run for real."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from click.testing import CliRunner

from pipeline.base.errors import ConfigError
from pipeline.config.reader import load_config
from pipeline.data.layouts import to_pair
from pipeline.data.pairs import Pair
from pipeline.data.sources import open_source, read_rows
from stages.check.estimate import MEMORY_BAND, UTILISATION
from stages.check.shapes import shapes_of
from stages.cli import main
from support import recipe_figures
from support.models import make_model, make_tokenizer
from support.recipe_figures import RECIPES, Recipe
from support.runs import HH, refshard

FILES = sorted(RECIPES.glob("*.yaml"))
WITH_FIGURES = recipe_figures.recipes()
each_recipe = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
each_with_figures = pytest.mark.parametrize("recipe", WITH_FIGURES, ids=lambda recipe: recipe.file.stem)


@each_recipe
def test_every_recipe_loads_and_every_field_in_it_exists(file: Path) -> None:
    config = load_config(file)
    options = config.train.options
    assert config.train.folder
    assert config.data.eval
    # The library itself takes them; FSDP and bf16 it takes only where there are GPUs.
    of_gpus = ("bf16", "fsdp", "fsdp_config")
    transformers.TrainingArguments(**{k: v for k, v in options.items() if k not in of_gpus}, use_cpu=True)


@each_recipe
def test_a_field_that_does_not_exist_is_refused_in_every_recipe(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_lenght: unknown key; did you mean data\.max_length"):
        load_config(file, ["data.max_lenght=1"])
    with pytest.raises(ConfigError, match=r"train\.learning_rat: no such field"):
        _ = load_config(file, ["train.learning_rat=1"]).train.options


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("#   refshard ")]


@each_recipe
def test_the_commands_at_the_head_are_commands_and_name_the_recipe_and_its_hardware(file: Path) -> None:
    found, config = commands(file.read_text()), load_config(file)
    assert ["refshard", "recipes", "copy", file.stem, "run.yaml"] in found
    said = {words[1] for words in found}
    # With a reference that moves, one command does both stages.
    assert "train" in said or "sweep" in said
    assert ("precompute" in said) == (config.reference.sync is None and "sweep" not in said)
    for words in found:
        command: click.Command = main
        context = click.Context(main)
        rest = words[1:]
        while isinstance(command, click.Group):
            _, command, rest = command.resolve_command(context, rest)
            assert command is not None
        # Options are read, nothing is run.
        parameters = command.make_context(words[1], list(rest)).params
        if config.cluster.train.processes > 1 and words[1] in ("precompute", "train"):
            assert parameters["processes"] == config.cluster.train.processes


@each_with_figures
def test_slurm_jobs_of_a_recipe_ask_for_the_hardware_at_its_head(recipe: Recipe, tmp_path: Path) -> None:
    words = ["submit", "slurm", "--config", str(recipe.file), "--into", str(tmp_path / "jobs")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    trains = (tmp_path / "jobs" / "train.sh").read_text()
    count = recipe.hardware.count
    assert f"--gpus-per-node={count}" in trains
    assert f"--time={recipe.config.cluster.train.time}" in trains


# --- Forms --------------------------------------------------------------------------------------------------------
# Rows as the hub's files hold them: columns, nesting and types, written by hand, and the pair that each must become.

TEXT = pa.string()
CONVERSATION = pa.list_(pa.struct([("content", TEXT), ("role", TEXT)]))


def said(role: str, content: str) -> dict[str, str]:
    return {"content": content, "role": role}


QUESTION, GOOD, BAD = said("user", "Two plus two?"), said("assistant", "Four."), said("assistant", "Five.")
SYSTEM, FIRST, REPLY = said("system", "Be brief."), said("user", "Hi"), said("assistant", "Hello.")
ONE_TURN = Pair(prompt=[QUESTION], chosen=[GOOD], rejected=[BAD])
WITH_SYSTEM = Pair(prompt=[SYSTEM, QUESTION], chosen=[GOOD], rejected=[BAD])
TWO_TURNS = Pair(prompt=[FIRST, REPLY, QUESTION], chosen=[GOOD], rejected=[BAD])
WHOLE = {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}
LONGER = {"chosen": [FIRST, REPLY, QUESTION, GOOD], "rejected": [FIRST, REPLY, QUESTION, BAD]}


@dataclasses.dataclass(frozen=True)
class Form:
    """A set of the hub: its columns and their types, its splits, two rows, and the pairs that they are."""

    splits: tuple[str, ...]
    columns: dict[str, pa.DataType]
    rows: tuple[dict[str, Any], ...]
    pairs: tuple[Pair, Pair]

    def write(self, folder: Path) -> Path:
        """Lay it out as the hub does: `data/SPLIT-00000-of-00001.parquet`."""
        (folder / "data").mkdir(parents=True)
        table = pa.Table.from_pylist(list(self.rows), schema=pa.schema(list(self.columns.items())))
        for split in self.splits:
            pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
        return folder


def columns(text: str = "", conversations: str = "", numbers: str = "") -> dict[str, pa.DataType]:
    kinds = ((TEXT, text), (CONVERSATION, conversations), (pa.float64(), numbers))
    return {name: kind for kind, names in kinds for name in names.split()}


PLAIN = {"chosen": "Four.", "rejected": "Five."}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Again?\n\nAssistant:"
ASKED = "\n\nHuman: Two plus two?\n\nAssistant:"

FORMS = {
    "HuggingFaceH4/ultrafeedback_binarized": Form(
        ("train_prefs", "test_prefs", "train_sft"),
        columns("prompt prompt_id", "chosen rejected messages", "score_chosen score_rejected"),
        (
            {"prompt": "Two plus two?", "prompt_id": "f0", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.0},
            {"prompt": "Hi", "prompt_id": "f1", **LONGER, "messages": LONGER["chosen"], "score_rejected": 1.0},
        ),
        (ONE_TURN, TWO_TURNS),
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": Form(
        ("train",),
        columns("source prompt chosen-model rejected-model", "chosen rejected", "chosen-rating rejected-rating"),
        ({"source": "sharegpt", "prompt": "Two plus two?", **WHOLE}, {"source": "flan", "prompt": "Hi", **LONGER}),
        (ONE_TURN, TWO_TURNS),
    ),
    "argilla/dpo-mix-7k": Form(
        ("train", "test"),
        columns("dataset", "chosen rejected", "chosen_rating rejected_rating"),
        ({"dataset": "a", **WHOLE, "chosen_rating": 5.0}, {"dataset": "argilla/distilabel-capybara", **LONGER}),
        (ONE_TURN, TWO_TURNS),
    ),
    "trl-lib/ultrafeedback_binarized": Form(
        ("train", "test"),
        columns("", "chosen rejected", "score_chosen score_rejected"),
        ({**WHOLE, "score_chosen": 8.0, "score_rejected": 6.5}, LONGER),
        (ONE_TURN, TWO_TURNS),
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": Form(
        ("train",),
        columns("id prompt source", "chosen rejected"),
        ({"id": "a", "prompt": "Two plus two?", **WHOLE, "source": "s"}, {"id": "b", "prompt": "Hi", **LONGER}),
        (ONE_TURN, TWO_TURNS),
    ),
    "mlabonne/orpo-dpo-mix-40k": Form(
        ("train",),
        columns("source prompt question", "chosen rejected"),
        (
            {"source": "Airoboros", **WHOLE, "prompt": "Two plus two?", "question": "Two plus two?"},
            {"source": "Capybara", **LONGER, "prompt": "Hi"},
        ),
        (ONE_TURN, TWO_TURNS),
    ),
    "Intel/orca_dpo_pairs": Form(
        ("train",),
        columns("system question chosen rejected"),
        tuple({"system": system, "question": "Two plus two?", **PLAIN} for system in ("", "Be brief.")),
        (ONE_TURN, WITH_SYSTEM),
    ),
    "jondurbin/truthy-dpo-v0.1": Form(
        ("train",),
        columns("id source system prompt chosen rejected"),
        tuple({"id": "a", "system": system, "prompt": "Two plus two?", **PLAIN} for system in ("", "Be brief.")),
        (ONE_TURN, WITH_SYSTEM),
    ),
    "Anthropic/hh-rlhf": Form(
        ("train", "test"),
        columns("chosen rejected"),
        (
            {"chosen": f"{ASKED} Four.", "rejected": f"{ASKED} Five."},
            {"chosen": f"{TRANSCRIPT} Hello, hello.", "rejected": f"{TRANSCRIPT} Hello no more."},
        ),
        (
            Pair(prompt=ASKED, chosen=" Four.", rejected=" Five."),
            Pair(prompt=TRANSCRIPT, chosen=" Hello, hello.", rejected=" Hello no more."),
        ),
    ),
}


@each_with_figures
def test_the_form_of_the_recipes_set_gives_the_right_pairs(recipe: Recipe, tmp_path: Path) -> None:
    form = FORMS[recipe.config.data.path]
    data = load_config(recipe.file, [f"data.path={form.write(tmp_path / 'set')}"]).data
    pairs = [to_pair(row.load(), data.columns, row.place) for row in read_rows(open_source(data))]
    assert pairs == list(form.pairs)
    for name in data.eval:
        source = open_source(data, name)
        # A range behind the training rows has nothing here, where there are two.
        if source.start == 0:
            assert [to_pair(row.load(), data.columns, row.place) for row in read_rows(source)] == list(form.pairs)


def test_texts_that_become_a_conversation_are_scored_under_the_models_chat_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[INST]{{ m.role }}[/INST]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[INST]assistant[/INST]{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    overrides = {
        "data.path": FORMS["Intel/orca_dpo_pairs"].write(tmp_path / "set"),
        "data.split": "train",
        "data.eval": "{}",
        "policy.model": make_model(tmp_path / "model", tokenizer),
        "policy.dtype": "float32",
        "train.bf16": "false",
        "train.eval_strategy": "no",
        "reference.dtype": "float32",
        "precompute.output": tmp_path / "shards",
    }
    words = [x for k, v in overrides.items() for x in ("-o", f"{k}={v}")]
    refshard("precompute", "--config", RECIPES / "llama_8b_lora_24gb.yaml", *words)

    rows = pq.read_table(tmp_path / "shards" / "train" / "part-00000.parquet").to_pylist()
    for row, system in zip(rows, ("", "[INST]system[/INST]Be brief.<|im_end|>"), strict=True):
        prompt = system + "[INST]user[/INST]Two plus two?<|im_end|>[INST]assistant[/INST]"
        for name, answer in (("chosen", "Four."), ("rejected", "Five.")):
            whole = tokenizer(prompt + answer + "<|im_end|>", add_special_tokens=False).input_ids
            assert row["prompt_tokens"] + row[f"{name}_tokens"] == len(whole)
        assert row["prompt_tokens"] == len(tokenizer(prompt, add_special_tokens=False).input_ids)


# --- Figures ------------------------------------------------------------------------------------------------------


@each_with_figures
def test_the_figures_at_the_head_are_what_the_estimator_says(recipe: Recipe) -> None:
    again = "run: python tests/support/recipe_figures.py --write"
    head = dict(re.findall(r"^#   (stage one|stage two|disk|host memory) +(.+)$", recipe.text, re.MULTILINE))
    assert head == recipe_figures.figures(recipe), again
    assert recipe_figures.with_figures(recipe) == recipe.text, again
    assert "not measured" in recipe.text


@each_with_figures
def test_a_recipe_fits_what_it_asks_for(recipe: Recipe) -> None:
    found, cluster = recipe.estimate(), recipe.config.cluster
    assert found.train is not None
    assert found.train.seconds is not None
    assert found.precompute.seconds is not None
    for stage in (found.precompute, found.train):
        assert stage.total_memory < 0.95 * recipe.hardware.memory
    assert cluster.train.processes == recipe.hardware.count
    workers = cluster.workers * cluster.precompute.processes
    assert workers == recipe.hardware.count
    # A worker's share takes as long as all of them together were counted for.
    for job, stage in ((cluster.precompute, found.precompute), (cluster.train, found.train)):
        assert stage.seconds[2] < seconds(str(job.time))
    if recipe.config.policy.quantization is None:
        # Each process of stage two loads all of the policy; under FSDP one of them.
        size = 4 if recipe.config.policy.dtype == "float32" else 2
        copies = 1 if recipe.config.train.options.get("fsdp") else recipe.hardware.count
        weights = copies * recipe.shapes().parameters * size
        assert weights < found.host_memory < weights + recipe.hardware.count * 10**9
    assert found.host_memory < gibibytes(str(cluster.train.memory))


def seconds(limit: str) -> int:
    hours, minutes, rest = map(int, limit.split(":"))
    return 3600 * hours + 60 * minutes + rest


def gibibytes(size: str) -> int:
    assert size.endswith("G")
    return int(size[:-1]) * 2**30


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
    ],
)
def test_the_models_have_the_parameters_that_their_hub_pages_state(model: str, parameters: int) -> None:
    assert recipe_figures.MODELS[model].shapes(None).parameters == parameters


def test_parameters_counted_by_hand_are_those_of_the_library(tmp_path: Path) -> None:
    small = dataclasses.replace(recipe_figures.MODELS["Qwen/Qwen2.5-0.5B-Instruct"], layers=2)
    settings = transformers.Qwen2Config(
        hidden_size=small.hidden,
        intermediate_size=small.intermediate,
        num_hidden_layers=small.layers,
        num_attention_heads=small.heads,
        num_key_value_heads=small.key_value_heads,
        vocab_size=small.vocabulary,
        tie_word_embeddings=small.tied,
    )
    policy = load_config(RECIPES / "qwen_1.5b_sweep_24gb.yaml").policy
    assert policy.lora is not None
    assert small.shapes(policy.lora) == shapes_of(settings, policy)
    assert small.shapes(None) == shapes_of(settings)


def test_the_page_of_recipes_names_every_file_and_repeats_their_figures() -> None:
    page = recipe_figures.PAGE.read_text()
    for file in FILES:
        assert file.name in page
    cells = re.findall(r"^\| \[(.+?)\]\(.+?\) \| (.+?) \| (.+?) \| (.+?) \|", page, re.MULTILINE)
    rows = {name: tuple(others) for name, *others in cells}
    for recipe in WITH_FIGURES:
        head = dict(re.findall(r"^#   (stage one|stage two) +(.+)$", recipe.text, re.MULTILINE))
        assert rows[recipe.file.name] == (recipe.hardware.label, head["stage one"], head["stage two"])
    assert len(rows) == len(FILES) - 1  # the embedded default runs on a laptop
    assert recipe_figures.page_with_table(page) == page, "run: python tests/support/recipe_figures.py --write"
    for name in FORMS:
        assert name in page
    best, about, worst = UTILISATION[::-1]
    assert f"reaches {about} of its peak ({best} to {worst} in brackets)" in " ".join(page.split())
    assert f"within {MEMORY_BAND[0]} to {MEMORY_BAND[1]} times" in page


@pytest.mark.slow
@pytest.mark.skipif(not HH.exists(), reason=f"the HH-RLHF pairs are not at {HH}")
def test_the_hh_recipe_runs_both_stages_on_real_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "model", make_tokenizer(bos=True))
    overrides = {
        "data.path": HH,
        "data.split": "train[:500]",
        "data.eval": "{test: {split: 'train[1400:]'}}",
        "data.max_length": 512,
        "policy.model": tmp_path / "model",
        "reference.dtype": "float32",
        "precompute.output": tmp_path / "shards",
        "precompute.rows_per_shard": 128,
        "train.output_dir": tmp_path / "policy",
        "train.bf16": "false",
        "train.max_steps": 4,
        "train.gradient_accumulation_steps": 1,
        "train.eval_strategy": "steps",
        "train.eval_steps": 4,
        "train.logging_steps": 1,
        "train.warmup_steps": 0,
        "train.use_cpu": "true",
    }
    arguments = ["--config", RECIPES / "hh_rlhf.yaml", *(x for k, v in overrides.items() for x in ("-o", f"{k}={v}"))]
    scored = refshard("precompute", *arguments)
    trained = refshard("train", *arguments)

    assert all(word in scored.stderr for word in ("rows/s", "tokens/s"))
    totals = {}
    for name, rows in (("train", 500), ("test", 100)):
        totals[name] = json.loads((tmp_path / "shards" / name / "index.json").read_text())["totals"]
        assert totals[name]["rows"] == rows
        assert totals[name]["kept"] + sum(totals[name]["dropped"].values()) == rows
        assert totals[name]["kept"] > 0.75 * rows
        assert f"{name}: {rows:,} rows, {totals[name]['kept']:,} pairs kept" in scored.stdout
        assert f"{totals[name]['kept']:,} matched, 0 missing" in trained.stdout
    # This part of the set has answers that are empty; they are skipped one by one, with their lines.
    skipped = [json.loads(line) for line in (tmp_path / "shards" / "train" / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == totals["train"]["dropped"]["empty_completion"] > 0
    assert all(entry["place"].startswith(f"{HH}:") for entry in skipped)
    metrics = json.loads((tmp_path / "policy" / "run.json").read_text())["metrics"]
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with capsys.disabled():
        print(f"\n{scored.stdout}")


@pytest.mark.slow
def test_a_lora_run_ends_in_a_folder_that_peft_loads_and_a_card_that_states_it(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    config = make_run(policy={"lora": {"r": 4, "alpha": 8}})
    refshard("precompute", "--config", config)
    refshard("train", "--config", config)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    ids = tokenizer("What is 2 plus 3?", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3
    card = (tmp_path / "policy" / "README.md").read_text()
    fingerprint = json.loads((tmp_path / "shards" / "train" / "manifest.json").read_text())["fingerprint"]
    for part in (fingerprint, "beta 0.1", "pairs.jsonl", "LoRA, rank 4", str(tmp_path / "pairs.jsonl"), "24 pairs"):
        assert part in card
    saved = load_config(tmp_path / "policy" / "refshard.yaml")
    assert saved.policy.lora is not None
    assert saved.policy.lora.r == 4
