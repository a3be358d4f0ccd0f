"""Find the loops of machine code, and count what a warp executes in one iteration.

`parse` reads the output of nvdisasm. The body of a loop also contains code for rare
cases, such as unaligned rows, so the length of the body says little. `Function.path`
therefore counts the shortest path through a loop that passes the instructions of the
common case: for example, the matrix products and the 16-byte copies of one tile.
"""

import functools
import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from instruction_units import MEMORY, lane_bytes, unit_of

# The patterns match lines such as these:
#     .section .text.linkage,"ax",@progbits
# .L_x_3:
#     /*0120*/  @!P0 BRA `(.L_x_3) ;
_SECTION = re.compile(r"\n\s*\.section\s+\.text\.(\w+)")
_LABEL = re.compile(r"([.$\w]+):$")
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]+\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
)
_TARGET = re.compile(r"`\(([.$\w]+)\)")
# The instructions that end a basic block.
_ENDS = "EXIT", "RET", "BRA", "BRX", "JMP", "BPT"


class Instruction(NamedTuple):
    """One instruction; it is `conditional` if a predicate decides whether it runs."""

    opcode: str
    conditional: bool
    targets: tuple[str, ...]


class Loop(NamedTuple):
    """A natural loop: its header, where every path enters it, and all its blocks."""

    header: int
    blocks: frozenset[int]


class Path(NamedTuple):
    """The instructions that a warp executes on one path, counted by opcode."""

    opcodes: Counter[str]

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def units(self) -> dict[str, int]:
        """Return the instructions of each unit, the busiest first."""
        counts: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            counts[unit_of(opcode)] += count
        return dict(counts.most_common())

    def count(self, opcode: str) -> int:
        """Return how many instructions have an opcode, with any modifiers behind it."""
        # The final dots let "LDG.E" match "LDG.E.128", but "LDG.E.12" match neither.
        return sum(
            n for x, n in self.opcodes.items() if f"{x}.".startswith(f"{opcode}.")
        )

    @property
    def lane_bytes(self) -> dict[str, int]:
        """Return the bytes that each lane moves, by unit."""
        moved: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            if (unit := unit_of(opcode)) in MEMORY:
                moved[unit] += count * lane_bytes(opcode)
        return dict(moved)


class NoPathError(LookupError):
    """No loop passes the requested instructions, or no path through the loop does."""


class Function:
    """One kernel's machine code: its basic blocks, and their loops."""

    def __init__(self, name: str, code: list[Instruction], labels: dict[str, int]):
        self.name = name
        # A block starts at a label, or behind an instruction that ends a block.
        starts = {0, *labels.values()}
        starts |= {i + 1 for i, x in enumerate(code) if _ends_block(x)}
        self._starts = sorted(x for x in starts if x < len(code))
        ends = [*self._starts[1:], len(code)]
        self._code = [code[a:b] for a, b in zip(self._starts, ends, strict=True)]
        block_at = {start: i for i, start in enumerate(self._starts)}
        self._at = {x: block_at[i] for x, i in labels.items() if i in block_at}
        self._next = [self._successors(i) for i in range(len(self._code))]  # edges

    @property
    def code(self) -> Path:
        """Return all instructions of the kernel, each once, without padding (NOP)."""
        return Path(
            Counter(x.opcode for code in self._code for x in code if x.opcode != "NOP")
        )

    def _successors(self, block: int) -> tuple[int | None, ...]:
        """Return the blocks that can follow; None stands for the end of the kernel."""
        last = self._code[block][-1]
        word = last.opcode.split(".")[0]
        after = block + 1 if block + 1 < len(self._code) else None
        if word not in _ENDS:
            return (after,)
        jumps = tuple([self._at[x] for x in last.targets if x in self._at])
        # EXIT and RET lead to the end, jumps to their targets. Under a predicate, the
        # next block can follow as well.
        gone = jumps if word in ("BRA", "BRX", "JMP") else (None,)
        return (*gone, after) if last.conditional else gone

    @functools.cached_property
    def _blocks(self) -> list[Counter[str]]:
        """Return the opcodes of each block; a call includes the called function."""
        return [self._opcodes(code) for code in self._code]

    def _opcodes(self, code: list[Instruction]) -> Counter[str]:
        counts = Counter(x.opcode for x in code if x.opcode != "NOP")
        for x in code:
            if (
                x.opcode.startswith("CALL")
                and x.targets[:1]
                and x.targets[0] in self._at
            ):
                counts += self._callee(self._at[x.targets[0]])
        return counts

    def _callee(self, start: int) -> Counter[str]:
        """Return the opcodes on the shortest path from a block to a return."""
        # Dijkstra's algorithm. The cost of a path is its number of instructions.
        queue: list[tuple[int, int, tuple[int, ...]]] = [(0, start, ())]
        seen = set()
        while queue:
            cost, block, way = heapq.heappop(queue)
            if block in seen:
                continue
            seen.add(block)
            way = (*way, block)
            for after in self._next[block]:
                if after is None:
                    return Counter(x.opcode for i in way for x in self._code[i])
                cost_after = cost + len(self._code[block])
                heapq.heappush(queue, (cost_after, after, way))
        return Counter()

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Return the natural loops, the innermost ones first.

        An edge from a block back to a header that dominates it closes a loop. The loop
        consists of all blocks that reach this edge without passing the header. Edges
        with the same header form one loop.
        """
        order = self._postorder()
        before: dict[int, set[int]] = {block: set() for block in order}
        for block in order:
            for after in self._next[block]:
                if after is not None:
                    before[after].add(block)
        immediate = _immediate_dominators(order, before)
        bodies: dict[int, set[int]] = {}
        for block in order:
            for header in self._next[block]:
                if header is None or not _dominates(header, block, immediate):
                    continue
                # Walk backwards from the edge, up to the header.
                body, rest = bodies.setdefault(header, {header}), [block]
                while rest:
                    if (x := rest.pop()) not in body:
                        body.add(x)
                        rest += before[x]
        loops = [Loop(header, frozenset(body)) for header, body in bodies.items()]
        return sorted(loops, key=lambda loop: (len(loop.blocks), loop.header))

    def _postorder(self) -> list[int]:
        """Return the blocks that can be reached, each behind those that follow it."""
        # A depth-first search without recursion, whose depth Python limits.
        order, seen, stack = [], {0}, [(0, iter(self._next[0]))]
        while stack:
            block, rest = stack[-1]
            for after in rest:
                if after is not None and after not in seen:
                    seen.add(after)
                    stack.append((after, iter(self._next[after])))
                    break
            else:
                order.append(block)
                stack.pop()
        return order

    def loop_through(
        self, via: dict[str, int], work: str, inside: Loop | None = None
    ) -> tuple[Loop, Path]:
        """Return the innermost loop that passes the opcodes `via`, and a path in it.

        `via` maps an opcode to the number of such instructions that the path passes at
        least. An opcode includes all its modifiers: "LDG" includes "LDG.E.128". If
        several innermost loops do so, the result is the one with the fewest
        instructions for each instruction `work`. With `inside`, the loop is inside that
        loop.
        """
        inner: list[tuple[float, Loop, Path]] = []
        for loop in self.loops:
            if inside and not loop.blocks < inside.blocks:
                continue
            # `loops` starts with the innermost ones: skip a loop around a result.
            if any(other.blocks < loop.blocks for _, other, _ in inner):
                continue
            try:
                path = self.path(loop, via)
            except NoPathError:
                continue  # it lacks some of the instructions
            inner.append((path.instructions / max(path.count(work), 1), loop, path))
        if not inner:
            raise NoPathError(f"{self.name}: no loop passes {_spelled(via)}")
        _, loop, path = min(inner, key=lambda x: x[0])
        return loop, path

    def loop_around(self, inner: Loop) -> Loop:
        """Return the smallest loop that contains another."""
        for loop in self.loops:
            if inner.blocks < loop.blocks:
                return loop
        raise NoPathError(f"{self.name}: no loop around the inner one")

    def path(
        self, loop: Loop | None, via: dict[str, int], apart: Iterable[Loop] = ()
    ) -> Path:
        """Return the shortest path through a loop, or the kernel, that passes `via`.

        The path passes at least as many instructions of each opcode as `via` says. It
        also passes the loops `apart`, but their instructions are not counted.
        """
        apart = tuple(apart)
        free = frozenset().union(*(x.blocks for x in apart))
        # The requirements: a count of each opcode, and one pass of each loop `apart`.
        wanted = *via.values(), *(1 for _ in apart)
        start = loop.header if loop else 0

        @functools.cache
        def passed(block: int) -> tuple[int, ...]:
            """Return how much of each requirement a block satisfies."""
            path = Path(Counter() if block in free else self._blocks[block])
            return *map(path.count, via), *(block == x.header for x in apart)

        def cost(block: int) -> int:
            # Loops in `apart` are counted by another call.
            return 0 if block in free else self._blocks[block].total()

        def seen(before: tuple[int, ...], block: int) -> tuple[int, ...]:
            counts = zip(before, passed(block), wanted, strict=True)
            # Counts beyond the requirement are all alike, so the number of nodes of the
            # search is finite.
            return tuple([min(x + y, limit) for x, y, limit in counts])

        # Dijkstra's algorithm on nodes (block, what the path has passed so far). `came`
        # holds the node before each node.
        first = start, seen((0,) * len(wanted), start)
        least, came = {first: cost(start)}, {first: first}
        queue = [(cost(start), *first)]
        while queue:
            length, block, counts = heapq.heappop(queue)
            if length > least[block, counts]:
                continue  # a shorter path to this node came first
            for after in self._next[block]:
                done = after == start if loop else after is None
                if done and counts == wanted:
                    return Path(self._along((block, counts), came, free))
                if after is None or done or (loop and after not in loop.blocks):
                    continue
                node = after, seen(counts, after)
                if (far := length + cost(after)) < least.get(node, math.inf):
                    least[node], came[node] = far, (block, counts)
                    heapq.heappush(queue, (far, *node))
        where = "loop" if loop else "kernel"
        raise NoPathError(
            f"{self.name}: no way through the {where} passes {_spelled(via)}"
        )

    def _along(
        self,
        node: tuple[int, tuple[int, ...]],
        came: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]],
        free: frozenset[int],
    ) -> Counter[str]:
        """Return the opcodes on the path that ends at a node, without `free` blocks."""
        total: Counter[str] = Counter()
        while True:
            if node[0] not in free:
                total += self._blocks[node[0]]
            if came[node] == node:
                return total
            node = came[node]


def _immediate_dominators(
    order: list[int], before: dict[int, set[int]]
) -> dict[int, int]:
    """Return the immediate dominator of each block.

    A block x dominates y if every path from block 0 to y passes x. The immediate
    dominator is the last such block before y. `order` is a postorder, which ends with
    block 0. The algorithm is that of Cooper, Harvey and Kennedy: "A Simple, Fast
    Dominance Algorithm", 2001.
    """
    rank = {block: i for i, block in enumerate(order)}
    immediate = {0: 0}

    def common(x: int, y: int) -> int:
        """Return the nearest block that dominates both."""
        # Dominators have higher ranks, so step up from the block of the lower rank.
        while x != y:
            while rank[x] < rank[y]:
                x = immediate[x]
            while rank[y] < rank[x]:
                y = immediate[y]
        return x

    # Repeat until nothing changes: edges back to a header may need another pass.
    changed = True
    while changed:
        changed = False
        for block in reversed(order[:-1]):
            dominator = functools.reduce(
                common, [x for x in before[block] if x in immediate]
            )
            changed |= immediate.get(block) != dominator
            immediate[block] = dominator
    return immediate


def _dominates(x: int, block: int, immediate: dict[int, int]) -> bool:
    while block not in (x, 0):
        block = immediate[block]
    return block == x


def _spelled(via: dict[str, int]) -> str:
    return " and ".join(f"{count} {opcode}" for opcode, count in via.items())


def _ends_block(x: Instruction) -> bool:
    return x.opcode.split(".")[0] in _ENDS


def parse(text: str, kernels: Iterable[str]) -> dict[str, Function]:
    """Return kernels of nvdisasm's text, by name."""
    _, *parts = _SECTION.split(text)  # name, its text, name, its text, ...
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    functions = {}
    for name in kernels:
        part = sections[name]
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in map(str.strip, part.splitlines()):
            if label := _LABEL.match(line):
                labels[label[1]] = len(code)
            elif code_match := _INSTRUCTION.match(line):
                predicate, opcode, operands = code_match.groups()
                code.append(_instruction(predicate, opcode, operands))
        functions[name] = Function(name, code, labels)
    return functions


def _instruction(predicate: str | None, opcode: str, operands: str) -> Instruction:
    word = opcode.split(".")[0]
    # PT is always true. An instruction under @!PT is issued but does nothing.
    if predicate and predicate.strip() == "@!PT":
        return Instruction("PREDICATED_OFF", False, ())
    # A jump may also name its predicate after the opcode, and BRA.DIV needs none.
    also = word in _ENDS and re.match(r"!?U?P\d|UR", operands)
    conditional = bool(predicate or also or opcode.startswith("BRA.DIV"))
    targets = _TARGET.findall(operands)
    if word == "BRX":  # a jump table, which lists its labels without "`()"
        targets += re.findall(r"\.L_x_\w+", operands)
    return Instruction(opcode, conditional, tuple(targets))
