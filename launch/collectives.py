"""What a compiled program sends between devices, from its HLO text."""

import collections
import math
import re

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}  # other types end in their width
_INSTRUCTION = re.compile(rf"%?([\w.\-]+) = (.*?) ({'|'.join(_KINDS)})(-start)?\(%?([\w.\-]+)")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+))\w*\[([\d,]*)\]")


def sizes(hlo: str, loops: int = 1) -> dict[str, int]:
    """Bytes that each kind of collective handles on one device, as {"all-reduce": ...}.

    The size is that of the whole array: an all-gather's output, a reduce-scatter's input. The TPU
    compiler splits one operation into a chain of steps, which count once, and writes a
    reduce-scatter as an all-reduce inside a computation named after it.

    Args:
      hlo: `compiled.as_text()`.
      loops: iterations of a loop that communicates; the text has its body once.
    """
    blocks = _computations(hlo)
    in_loops = _reachable(blocks, set(re.findall(r"\bbody=%?([\w.\-]+)", hlo)))
    found = {}
    for name, lines in blocks.items():
        shapes = {}
        for line in lines:
            defined = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ", line)
            if defined:
                shapes[defined[1]] = defined[2]
            match = _INSTRUCTION.search(line)
            if not match:
                continue
            instruction, result, kind, start, operand = match.groups()
            size = _bytes(result, largest=bool(start) and kind != "all-reduce")
            if kind == "reduce-scatter":
                size = _bytes(shapes.get(operand, result))
            if "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            times = loops if name in in_loops else 1
            chain = _CHAIN.search(line)
            found[chain.groups() if chain else instruction] = (kind, size * times)
    total = collections.Counter()
    for kind, size in found.values():
        total[kind] += size
    return dict(total)


def traffic(by_kind: dict[str, int]) -> int:
    """Bytes that one device sends for these collectives, each on a ring of many devices.

    An all-reduce is a reduce-scatter and an all-gather, so it counts twice.
    """
    return sum(by_kind.values()) + by_kind.get("all-reduce", 0)


def _computations(hlo):
    """{name: lines} of a module's computations."""
    blocks, lines = {}, []
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            lines = blocks.setdefault(header[1], [])
        else:
            lines.append(line)
    return blocks


def _reachable(blocks, names):
    seen, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in seen or name not in blocks:
            continue
        seen.add(name)
        todo += re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)", "".join(blocks[name]))
    return seen


def _bytes(shape, largest=False):
    """Bytes of "f32[8,128]" or of a tuple; `largest`: of its largest part, if it is (in, out)."""
    parts = [
        _BITS.get(kind, int(width or 8)) // 8 * math.prod(int(d) for d in dims.split(",") if d)
        for kind, width, dims in _ARRAY.findall(shape)
    ]
    return max(parts, default=0) if largest else sum(parts)
