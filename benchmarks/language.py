"""What static INT8 leaves of a decoder: perplexity of SmolLM2-135M with every linear layer on integers.

    python -m benchmarks.language [min-max] [percentile] [smoothquant] [smoothquant-auto] [os+] [best-of-both]
                                  [gptq] [combination] [worst]

One scale per activation tensor, one per output channel of a weight, no zero points: what TensorRT takes. Each row
quantizes all 211 linear layers and leaves none in float to rescue the result; in the last column the 60 products of
attention are quantized, too, by the same plan. `best-of-both` takes for each group of channels the better one of
SmoothQuant and OS+, with min-max ranges as in the rows before it; `gptq` is the same, with weights rounded by what the
layers read. `combination` is what `qonnx quantize` does: `best-of-both`, with the calibrator chosen on data. `worst`
prints two rows: the combination, with those layers in float that cost most alone.

Perplexity is measured on 16 excerpts of 255 tokens that nothing else sees. A change is the mean difference of their
log-likelihoods, as a factor of the perplexity, with its standard error over the excerpts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

import qonnx
from models import smollm2
from models.common import Batch
from qonnx.graph import load
from qonnx.linear import linears
from qonnx.passes.prepare import prepare
from qonnx.plan import QuantPlan
from qonnx.runtime import session
from qonnx.sensitivity import LayerCost, layer_costs
from qonnx.smooth_plan import apply

CALIBRATION_BATCHES, TEST_BATCHES = 32, 8

# Of two excerpts so many tokens are enough to rank single layers on.
RANKING_TOKENS = 48

EVERY_LAYER = ["goal_sqnr_db=0", "minimum_sqnr_db=-100"]
PLAIN = ["smooth.kind=none", "equalize.kind=none"]
MINMAX = ["activations.calibrator.kind=minmax", "equalize.kind=none"]
ROWS: Mapping[str, Sequence[str]] = {
    "min-max": [*MINMAX, *PLAIN],
    "percentile": ["activations.calibrator={kind: percentile, percentile: 99.999}", *PLAIN],
    "smoothquant": [*MINMAX, "smooth={kind: smoothquant, alpha: 0.5}"],
    "smoothquant-auto": [*MINMAX, "smooth.kind=smoothquant"],
    "os+": [*MINMAX, "smooth.kind=outlier_suppression"],
    "best-of-both": MINMAX,
    "gptq": [*MINMAX, "weights.rounding=gptq"],
    "combination": ["equalize.kind=none"],
}
WORST = "worst"
IN_FLOAT = (3, 6)

Losses = npt.NDArray[np.float64]
Cells = tuple[str, str, str]


@dataclass(frozen=True)
class Benchmark:
    """The float model, what calibrates it, and what it predicts.

    Attributes:
        folder: for files.
        source: the float model.
        prepared: the same in normal form.
        data: calibration batches.
        reference: [excerpts, tokens] the losses of the float model.
        made: of each row that was quantized the plan and the cell.
    """

    folder: Path
    source: Path
    prepared: ir.Model
    data: Sequence[Batch]
    reference: Losses
    made: dict[str, tuple[QuantPlan, str]] = field(default_factory=dict)

    def row(self, name: str) -> Cells:
        """Quantizes by one recipe, with and without the products of attention."""
        plan, full = self.quantize(name)
        return name, self.replay(plan, self.products(plan)), full

    def worst(self) -> Iterator[Cells]:
        """Quantizes by the last recipe, and leaves the most costly layers in float."""
        plan, _ = self.quantize("combination")
        costs = self.costs(plan)
        for count in IN_FLOAT:
            left = {cost.node for cost in costs[:count]}
            listed = ", ".join(f"{cost.path or cost.node} {cost.sqnr_db:.1f} dB" for cost in costs[:count])
            print(f"the {count} that cost most alone: {listed}", file=sys.stderr)
            yield f"{count} in float", self.replay(plan, left | self.products(plan)), self.replay(plan, left)

    def quantize(self, name: str) -> tuple[QuantPlan, str]:
        """The plan of a row that leaves no layer in float, and the cell of what it makes."""
        if name not in self.made:
            output = self.folder / "quantized.onnx"
            plan = qonnx.quantize(self.source, self.data, output, settings=[*EVERY_LAYER, *ROWS[name]]).plan
            self.made[name] = plan, self.cell(output, plan)
        return self.made[name]

    def replay(self, plan: QuantPlan, left: Collection[str]) -> str:
        """The cell of a plan with some layers in float."""
        layers = [
            msgspec.structs.replace(layer, reason="left in float") if layer.node in left else layer
            for layer in plan.layers
        ]
        plan = msgspec.structs.replace(plan, layers=tuple(layers))
        output = self.folder / "quantized.onnx"
        return self.cell(output, qonnx.quantize(self.source, self.data, output, plan=plan).plan)

    def cell(self, output: Path, plan: QuantPlan) -> str:
        """The perplexity of a file, its change, and how many layers are quantized."""
        found = losses(output)
        gains = found.mean(axis=1) - self.reference.mean(axis=1)
        change, error = 100 * np.expm1(gains.mean()), 100 * gains.std(ddof=1) / np.sqrt(gains.size)
        return f"{perplexity(found):.2f}, {change:+.1f} % ± {error:.1f} ({len(plan.quantized_layers)} layers)"

    def products(self, plan: QuantPlan) -> set[str]:
        """The products of two activations."""
        weighted = {linear.node.name for linear in linears(self.prepared.graph)}
        return {layer.node for layer in plan.quantized_layers if layer.node not in weighted}

    def costs(self, plan: QuantPlan) -> tuple[LayerCost, ...]:
        """What each layer does to the logits alone, the worst first."""
        tokens = {name: array[:, :RANKING_TOKENS] for name, array in self.data[0].items()}
        return layer_costs(apply(self.prepared, plan.smoothing), plan, tokens)


def losses(path: Path) -> Losses:
    return smollm2.excerpt_losses(session(path).run, batches=TEST_BATCHES)


def perplexity(found: Losses) -> float:
    return float(np.exp(found.mean()))


def main(chosen: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in (*ROWS, WORST)]
    if unknown:
        sys.exit(f"no row {unknown[0]!r}: choose of {', '.join((*ROWS, WORST))}")
    console = Console(highlight=False, width=130)
    table = Table("static INT8", "linear layers", "and attention", "seconds", title="SmolLM2-135M: perplexity")
    with tempfile.TemporaryDirectory() as folder:
        example = smollm2.build()
        source = qonnx.export(
            example.module,
            example.args,
            Path(folder) / "float.onnx",
            dynamic_shapes=example.dynamic_shapes,
            verify=False,
        )
        reference = losses(source)
        table.add_row("float", f"{perplexity(reference):.2f}")
        prepared = load(source)
        prepare(prepared)
        data = list(smollm2.calibration(CALIBRATION_BATCHES))
        benchmark = Benchmark(Path(folder), source, prepared, data, reference)
        for name in chosen or (*ROWS, WORST):
            start = time.perf_counter()
            for cells in [benchmark.row(name)] if name in ROWS else benchmark.worst():
                print(*cells, file=sys.stderr, flush=True)  # it takes minutes: say what is known
                table.add_row(*cells, f"{time.perf_counter() - start:.0f}")
                start = time.perf_counter()
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
