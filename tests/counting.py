"""What a compiled program does: products and messages, read off its HLO text."""

import collections
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


def counted(text: str) -> collections.Counter:
    """Per device: flops of products, and bytes sent by each kind of collective.

    `dot` counts products of two matrices, `batched dot` those with batch dimensions;
    a loop counts as often as the compiler knows it to run, one of unknown length once
    under `unknown loops` and not at all in the sums.
    """
    computations, name, entry = {}, None, None
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and " = " not in line.split("(")[0]:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            computations[name].append(found.groups())
    memory = {}

    def of(name):
        if name not in memory:
            memory[name] = sum(
                map(of_instruction(name), computations[name]), collections.Counter()
            )
        return memory[name]

    def of_instruction(computation):
        shapes = {n: shape for n, shape, *_ in computations[computation]}

        def one(instruction):
            _, shape, operation, rest = instruction
            found = collections.Counter()
            if operation == "dot":
                batched = bool(re.search(r"lhs_batch_dims=\{\d", rest))
                found["batched dot" if batched else "dot"] = _flops(shape, rest, shapes)
            elif operation.removesuffix("-start") in _COLLECTIVES:
                found[operation.removesuffix("-start")] = _size(shape)
            inner = re.findall(
                r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                rest,
            )
            branches = re.search(r"branch_computations=\{(.*?)\}", rest)
            if branches:
                inner += re.findall(r"[\w.\-]+", branches[1])
            if operation == "while":
                body = re.search(r"body=%?([\w.\-]+)", rest)[1]
                times = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', rest)
                if times is None:
                    found["unknown loops"] += 1
                else:
                    for key, value in of(body).items():
                        found[key] += value * int(times[1])
            for other in inner:
                found += of(other)
            return found

        return one

    return of(entry)


_COLLECTIVES = (
    "collective-permute",
    "all-gather",
    "all-reduce",
    "all-to-all",
    "reduce-scatter",
)


def _flops(shape: str, rest: str, shapes: dict[str, str]) -> int:
    operand = re.match(r"\s*(?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+)", rest)
    left = _dims(shapes[operand[1]])
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
    length = math.prod(left[int(i)] for i in summed.split(",") if i)
    return 2 * math.prod(_dims(shape)) * length


def _dims(shape: str) -> list[int]:
    inside = re.search(r"\[([\d,]*)\]", shape)[1]
    return [int(n) for n in inside.split(",") if n]


def _size(shape: str) -> int:
    parts = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in parts
    )
