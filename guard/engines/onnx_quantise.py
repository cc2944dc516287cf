"""From the float32 graph to one whose model runs in int8.

Weights are int8 with a scale for each output channel. Activations are made uint8 at run time with a scale for each
*token*: with one for a whole batch, as ONNX Runtime's own dynamic quantisation has it, a text's score would depend on
what else is in its batch, and a token's on what follows it; and the first token of a text, whose activations dwarf all
others, would leave the rest a handful of steps. Channels that are large on every token are made smaller beforehand and
their weights larger (SmoothQuant, arXiv 2211.10438), as measured on a few texts. The embedding has a scale for each
row. Attention, norms, and the bank's encoder rows and heads stay float32.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_bank.errors import MissingExtraError
from guard.engines.onnx_sidecar import EXTRA
from guard.judge import Floats

SMOOTHING = 0.65  # how much of a channel's size goes from activations to weights; measured: 0.5 and 0.8 are worse
_LARGEST = 127.0
_MIDDLE = 128
_LEAST = 1e-10
_CONTRIB = "com.microsoft"


def write_int8(source: Path, target: Path, texts: Sequence[Sequence[int]], keep: str, largest: int) -> None:
    """Read the graph at `source` and write it with int8 weights.

    texts: ids to measure the sizes of channels on. keep: weights whose names begin so stay as they are. largest: bytes
    that one file may have; weights beyond go to `TARGET.data`.

    Raises MissingExtraError without onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(f"the int8 graph needs onnx: {EXTRA}") from error
    model = onnx.load(str(source))
    graph = _Graph(model)
    products = graph.products(keep)
    sizes = _channel_sizes(source, list(products), texts, onnx)
    graph.smooth(products, sizes)
    for nodes in products.values():
        graph.quantise_products(nodes)
    graph.quantise_embedding()
    graph.tidy()
    apart = model.ByteSize() > largest
    onnx.save(model, str(target), save_as_external_data=apart, location=f"{target.name}.data" if apart else None)


def _channel_sizes(source: Path, names: list[str], texts: Sequence[Sequence[int]], onnx: Any) -> dict[str, Floats]:
    """Of each named value, the largest magnitude that every channel reaches after the first token of a text."""
    import onnxruntime

    watched = onnx.load(str(source))
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    beside = source.with_name(f".{source.name}.watched")  # weights that lie in another file are found from there
    try:
        onnx.save(watched, str(beside))
        session = onnxruntime.InferenceSession(str(beside), options, providers=["CPUExecutionProvider"])
    finally:
        beside.unlink(missing_ok=True)
    sizes: dict[str, Floats] = {}
    for ids in texts:
        row = np.array([ids], dtype=np.int64)
        for name, value in zip(
            names, session.run(names, {"input_ids": row, "attention_mask": np.ones_like(row)}), strict=True
        ):
            size = np.abs(value.reshape(-1, value.shape[-1])[1:]).max(0, initial=0.0)
            sizes[name] = np.maximum(sizes[name], size) if name in sizes else size
    return sizes


class _Graph:
    """A model's graph while it is rewritten."""

    def __init__(self, model: Any) -> None:
        import onnx

        self._model = model
        self._helper, self._numpy, self._types = onnx.helper, onnx.numpy_helper, onnx.TensorProto
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._nodes: list[Any] = list(model.graph.node)
        self._makers = {output: node for node in self._nodes for output in node.output}
        self._uses = Counter(name for node in self._nodes for name in node.input)
        self._uses.update(output.name for output in model.graph.output)
        self._shared: set[str] = set()

    def products(self, keep: str) -> dict[str, list[Any]]:
        """The matrix products with a weight, by the name of what is multiplied."""
        found = defaultdict(list)
        for node in self._nodes:
            weight = self._weights.get(node.input[1]) if node.op_type == "MatMul" else None
            if weight is not None and len(weight.dims) == 2 and not weight.name.startswith(keep):
                found[node.input[0]].append(node)
        return dict(found)

    def smooth(self, products: Mapping[str, Sequence[Any]], sizes: Mapping[str, Floats]) -> None:
        """Make the channels of every value that is multiplied smaller where they are large on every token.

        sizes: (d,) of each value's channels. What makes the value is scaled where that is a weight already.
        """
        for name, nodes in products.items():
            height = np.max([np.abs(self._array(node.input[1])).max(1) for node in nodes], axis=0)
            smooth = np.maximum(sizes[name], 1e-5) ** SMOOTHING / np.maximum(height, 1e-5) ** (1 - SMOOTHING)
            for node in nodes:
                self._replace(node.input[1], self._array(node.input[1]) * smooth[:, None])
            if not self._scale(name, 1 / smooth, len(nodes)):
                scaled = self._node("Mul", [name, self._constant(f"{name}_smooth", _f32(1 / smooth))], f"{name}_even")
                self._insert_before(nodes, [scaled])
                for node in nodes:
                    node.input[0] = f"{name}_even"

    def _scale(self, name: str, factor: npt.NDArray[np.floating[Any]], uses: int) -> bool:
        """Scale the channels of a value by scaling a weight that they are made with; False if there is none.

        A norm multiplies by one, and a gate by the product of another weight, that nothing else may use.
        """
        if self._uses[name] != uses:
            return False
        made = self._makers.get(name)
        if made is None or made.op_type != "Mul":
            return False
        for part in made.input:
            if part in self._weights and self._array(part).shape == factor.shape and self._uses[part] == 1:
                self._replace(part, self._array(part) * factor)
                return True
            inner = self._makers.get(part)
            if inner is None or inner.op_type != "MatMul" or self._uses[part] != 1:
                continue
            weight = self._weights.get(inner.input[1])
            if weight is not None and self._uses[weight.name] == 1 and weight.dims[-1] == len(factor):
                self._replace(weight.name, self._array(weight.name) * factor)
                return True
        return False

    def quantise_products(self, nodes: Sequence[Any]) -> None:
        """Make the products of one value (B, T, d) with weights (d, n) int8."""
        name, (width, _) = nodes[0].input[0], self._array(nodes[0].input[1]).shape
        n = {part: f"{name}_{part}" for part in ("rows", "abs", "max", "least", "step", "u8", "column")}
        made = [
            self._node("Reshape", [name, self._constant(f"rows_{width}", np.array([-1, width]))], n["rows"]),
            self._node("Abs", [n["rows"]], n["abs"]),
            self._node("ReduceMax", [n["abs"], self._constant("last", np.array([-1]))], n["max"], keepdims=0),
            self._node("Max", [n["max"], self._constant("least", np.float32(_LEAST))], n["least"]),
            self._node("Div", [n["least"], self._constant("largest", np.float32(_LARGEST))], n["step"]),
            self._node("QuantizeLinear", [n["rows"], n["step"], self._middles()], n["u8"], axis=0),
            self._node("Unsqueeze", [n["step"], self._constant("last", np.array([-1]))], n["column"]),
        ]
        weight = np.concatenate([self._array(node.input[1]) for node in nodes], axis=1)  # one product costs less
        steps = _steps(np.abs(weight).max(0))
        small = self._constant(f"{name}_weight", np.round(weight / steps).astype(np.int8))
        one, middle = self._constant("one", np.float32(1.0)), self._constant("middle", np.uint8(_MIDDLE))
        scales = [one, self._constant(f"{name}_steps", steps), middle]
        outs = [node.output[0] for node in nodes]
        whole = outs[0] if len(outs) == 1 else f"{name}_products"
        made += [
            self._node("MatMulIntegerToFloat", [n["u8"], small, *scales], f"{name}_sum", domain=_CONTRIB),
            self._node("Mul", [f"{name}_sum", n["column"]], f"{name}_scaled"),
            self._node("Reshape", [f"{name}_scaled", self._shape(weight.shape[1])], whole),
        ]
        if len(outs) > 1:
            widths = np.array([self._array(node.input[1]).shape[1] for node in nodes])
            parts = [whole, self._constant(f"{name}_widths", widths)]
            made.append(self._helper.make_node("Split", parts, outs, name=f"{name}_Split", axis=-1))
        self._insert_before(nodes, made)
        replaced = {id(node) for node in nodes}  # two nodes may be equal
        self._nodes = [node for node in self._nodes if id(node) not in replaced]

    def _insert_before(self, nodes: Sequence[Any], made: Sequence[Any]) -> None:
        wanted = {id(node) for node in nodes}
        place = next(place for place, node in enumerate(self._nodes) if id(node) in wanted)
        self._nodes[place:place] = made

    def _middles(self) -> str:
        """(B T,) what stands for 0 on each token: QuantizeLinear wants as many as it has scales."""
        return self._first(
            "middles",
            lambda: [
                self._node("Size", ["input_ids"], "int8_size"),
                self._node("Unsqueeze", ["int8_size", self._constant("first", np.array([0]))], "int8_sizes"),
                self._node(
                    "ConstantOfShape",
                    ["int8_sizes"],
                    "int8_middles",
                    value=self._numpy.from_array(np.array([_MIDDLE], dtype=np.uint8)),
                ),
            ],
        )

    def _shape(self, width: int) -> str:
        """The shape (B, T, width)."""
        return self._first(
            f"shape_{width}",
            lambda: [
                self._node("Shape", ["input_ids"], f"int8_batch_{width}"),
                self._node(
                    "Concat",
                    [f"int8_batch_{width}", self._constant(f"width_{width}", np.array([width]))],
                    f"int8_shape_{width}",
                    axis=0,
                ),
            ],
        )

    def _first(self, name: str, make: Callable[[], list[Any]]) -> str:
        """The value `int8_NAME`, made at the graph's beginning when it is first asked for."""
        if name not in self._shared:
            self._shared.add(name)
            self._nodes[:0] = make()
        return f"int8_{name}"

    def quantise_embedding(self) -> None:
        """Make the table that the ids are looked up in int8."""
        for place, node in enumerate(self._nodes):
            if node.op_type == "Gather" and node.input[1] == "input_ids" and node.input[0] in self._weights:
                table, ids, out = self._array(node.input[0]), node.input[1], node.output[0]
                steps = _steps(np.abs(table).max(1, keepdims=True))
                rounded = self._constant(f"{out}_table", np.round(table / steps).astype(np.int8))
                self._nodes[place : place + 1] = [
                    self._node("Gather", [rounded, ids], f"{out}_i8"),
                    self._node("Cast", [f"{out}_i8"], f"{out}_f32", to=self._types.FLOAT),
                    self._node("Gather", [self._constant(f"{out}_steps", steps), ids], f"{out}_step"),
                    self._node("Mul", [f"{out}_f32", f"{out}_step"], out),
                ]
                return

    def tidy(self) -> None:
        """Put the nodes back, and drop the weights that none of them uses any more."""
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        del graph.initializer[:]
        graph.initializer.extend(weight for name, weight in self._weights.items() if name in used)
        del graph.value_info[:]
        if all(known.domain != _CONTRIB for known in self._model.opset_import):
            self._model.opset_import.append(self._helper.make_opsetid(_CONTRIB, 1))

    def _array(self, name: str) -> Floats:
        found: Floats = self._numpy.to_array(self._weights[name]).astype(np.float32)
        return found

    def _replace(self, name: str, value: npt.NDArray[np.floating[Any]]) -> None:
        self._weights[name] = self._numpy.from_array(_f32(value), name)

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        name = f"int8_{name}"
        if name not in self._weights:
            self._weights[name] = self._numpy.from_array(np.asarray(value), name)
        return name

    def _node(self, kind: str, inputs: Iterable[str], output: str, **options: Any) -> Any:
        return self._helper.make_node(kind, list(inputs), [output], name=f"{output}_{kind}", **options)


def _f32(value: npt.NDArray[np.floating[Any]]) -> Floats:
    return np.ascontiguousarray(value, dtype=np.float32)


def _steps(size: Floats) -> Floats:
    steps: Floats = np.maximum(size, _LEAST).astype(np.float32) / np.float32(_LARGEST)
    return steps
