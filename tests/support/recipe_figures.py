"""The figures at the head of each recipe and in docs/recipes.md: memory, time and disk, estimated, not measured.

    python tests/support/recipe_figures.py --write

writes them again; tests/docs/test_recipes.py holds that they are what the estimator says. A recipe's head states what
the estimate starts from (hardware, pairs, tokens), so that a reader can judge it, and this module reads it there.
Nothing is fetched: the sizes of the models are those of their public configs, written down here.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.reader import load_config
from pipeline.config.schema import Config, LoraSettings
from stages.check.estimate import Estimate, Lengths, StageEstimate, estimate
from stages.check.hardware import Hardware, hardware_named
from stages.check.shapes import Shapes

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "stages" / "recipes"
PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- figures, by tests/support/recipe_figures.py -->", "<!-- end of figures -->"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with gated feed-forward and rotary positions (Llama, Qwen2), as its config.json has it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False
    query_biases: bool = False
    """Qwen2: query, key and value projections have biases"""

    @property
    def key_value(self) -> int:
        return self.hidden // self.heads * self.key_value_heads

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """In and out of each linear layer of one decoder layer."""
        h, f, kv = self.hidden, self.intermediate, self.key_value
        return ((h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h))

    def shapes(self, lora: LoraSettings | None) -> Shapes:
        """Count the parameters by hand. LoRA has r (in + out) for each linear layer (arXiv 2106.09685)."""
        h = self.hidden
        biases = h + 2 * self.key_value if self.query_biases else 0
        products, head = self.layers * sum(i * o for i, o in self.products), 0 if self.tied else self.vocabulary * h
        layers = products + self.layers * (biases + 2 * h)
        parameters = layers + h + (1 if self.tied else 2) * self.vocabulary * h
        trained = parameters if lora is None else self.layers * lora.r * sum(i + o for i, o in self.products)
        return Shapes(
            layers=self.layers,
            hidden=h,
            intermediate=self.intermediate,
            query=h,
            key_value=self.key_value,
            vocabulary=self.vocabulary,
            parameters=parameters,
            layer_parameters=layers,
            active_parameters=layers,
            trained_parameters=trained,
            rank=None if lora is None else lora.r,
            product_parameters=products + head,
            head_parameters=head,
        )


_LLAMA_8B = {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "key_value_heads": 8}
_QWEN = {"key_value_heads": 2, "vocabulary": 151936, "tied": True, "query_biases": True}
MODELS: Mapping[str, Architecture] = {
    "Qwen/Qwen2.5-0.5B": Architecture(hidden=896, intermediate=4864, layers=24, heads=14, **_QWEN),
    "Qwen/Qwen2.5-0.5B-Instruct": Architecture(hidden=896, intermediate=4864, layers=24, heads=14, **_QWEN),
    "Qwen/Qwen2.5-1.5B-Instruct": Architecture(hidden=1536, intermediate=8960, layers=28, heads=12, **_QWEN),
    "meta-llama/Llama-3.1-8B-Instruct": Architecture(vocabulary=128256, **_LLAMA_8B),
    "allenai/Llama-3.1-Tulu-3-8B-SFT": Architecture(vocabulary=128264, **_LLAMA_8B),
    "meta-llama/Llama-3.3-70B-Instruct": Architecture(
        hidden=8192, intermediate=28672, layers=80, heads=64, key_value_heads=8, vocabulary=128256
    ),
}

_NAMES = ("stage one", "stage two", "disk", "host memory")
_ESTIMATED = "# Estimated by `refshard check`, not measured. The times count only computation."
_DATA = re.compile(
    r"^#   data +([\d,]+) pairs, ([\d,]+) held out; (\d+) tokens of prompt, (\d+) chosen, (\d+) rejected, on average$",
    re.MULTILINE,
)
_HARDWARE = re.compile(r"^#   hardware +(\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe with what its head says."""

    file: Path
    text: str
    config: Config
    hardware: Hardware
    pairs: int
    held_out: int
    prompt: int
    chosen: int
    rejected: int

    def lengths(self, pairs: int) -> Lengths:
        """So many pairs of the mean length; the longest fills max_length twice, a usual long one has twice the mean."""
        assert self.config.data.max_length is not None
        longest = 2 * self.config.data.max_length - self.prompt
        return Lengths(
            pairs=pairs,
            prompt_tokens=pairs * self.prompt,
            chosen_tokens=pairs * self.chosen,
            rejected_tokens=pairs * self.rejected,
            longest_pair=longest,
            usual_pair=min(longest, 2 * (self.prompt + self.chosen + self.rejected)),
        )

    def shapes(self) -> Shapes:
        return MODELS[self.config.policy.model].shapes(self.config.policy.lora)

    def estimate(self) -> Estimate:
        return estimate(
            self.config,
            self.shapes(),
            self.lengths(self.pairs),
            self.hardware,
            held_out=self.lengths(self.held_out),
        )


def read_recipe(file: Path) -> Recipe | None:
    """Read a recipe; None for one whose head states no data: the embedded default, which runs on a laptop."""
    text = file.read_text()
    data, hardware = _DATA.search(text), _HARDWARE.search(text)
    if data is None or hardware is None:
        return None
    pairs, held_out, prompt, chosen, rejected = (int(number.replace(",", "")) for number in data.groups())
    return Recipe(
        file=file,
        text=text,
        config=load_config(file),
        hardware=hardware_named(hardware[1]),
        pairs=pairs,
        held_out=held_out,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
    )


def recipes() -> list[Recipe]:
    """All recipes that have figures, the smallest hardware first."""
    found = [recipe for file in RECIPES.glob("*.yaml") if (recipe := read_recipe(file)) is not None]
    return sorted(found, key=lambda r: (r.hardware.count, r.hardware.memory, r.shapes().parameters, r.file.stem))


def figures(recipe: Recipe) -> dict[str, str]:
    """What the head says of each stage, of the disk and of the host's memory, by the line's name."""
    found = recipe.estimate()
    assert found.train is not None
    return {
        "stage one": f"{gigabytes(found.precompute.total_memory)} a GPU, {_time(found.precompute)}",
        "stage two": f"{gigabytes(found.train.total_memory)} a GPU, {_time(found.train)}",
        "disk": gigabytes(found.total_disk),
        "host memory": f"{gigabytes(found.host_memory)} while the policy is loaded",
    }


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 9.5e9 else f"{size / 1e9:.1f} GB"


def _time(stage: StageEstimate) -> str:
    assert stage.seconds is not None
    best, about, worst = stage.seconds
    if worst < 60:
        return "less than a minute"
    if about < 90 * 60:
        return f"{about / 60:.0f} minutes ({best / 60:.0f} to {worst / 60:.0f})"
    return f"{about / 3600:.1f} hours ({best / 3600:.1f} to {worst / 3600:.1f})"


def with_figures(recipe: Recipe) -> str:
    """The recipe's text, its figures written again below the data's line."""
    lines = recipe.text.splitlines()
    lines = [x for x in lines if x != _ESTIMATED and not re.match(rf"#   ({'|'.join(_NAMES)}) ", x)]
    at = next(i for i, line in enumerate(lines) if line.startswith("#   data ")) + 1
    lines[at:at] = [*(f"#   {name:<12} {value}" for name, value in figures(recipe).items()), _ESTIMATED]
    return "\n".join(lines) + "\n"


def table() -> list[str]:
    """The table of docs/recipes.md."""
    lines = [
        "| recipe | hardware | stage one | stage two | disk | host memory |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in recipes():
        name = recipe.file.name
        cells = [f"[{name}](../stages/recipes/{name})", recipe.hardware.label, *figures(recipe).values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page_with_table(text: str) -> str:
    """The page's text, its table written again between the two marks."""
    before, _, rest = text.partition(BEGIN)
    return "\n".join([before + BEGIN, *table(), END + rest.partition(END)[2]])


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        print("\n".join(table()))
        return
    for recipe in recipes():
        recipe.file.write_text(with_figures(recipe))
    PAGE.write_text(page_with_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
