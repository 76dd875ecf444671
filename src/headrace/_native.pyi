"""Types of the compiled module, native/src/module.cpp. Arguments named after an object are addresses."""

from collections.abc import Sequence

from typing_extensions import Buffer

PANEL: int

def level() -> str: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def busy_s() -> float: ...
def packed_bytes(outputs: int, inputs: int, type: int, /) -> int: ...
def page_elements(layers: int, kv_heads: int, head_dim: int, block_size: int) -> int: ...
def pack(
    weight: int,
    outputs: int,
    inputs: int,
    stride: int,
    type: int,
    packed_type: int,
    gated: bool,
    packed: int,
    /,
) -> None: ...
def linear(
    x: int,
    rows: int,
    x_stride: int,
    packed: int,
    bias: int,
    outputs: int,
    inputs: int,
    type: int,
    packed_type: int,
    gate: int,
    y: int,
    y_stride: int,
    output: int,
    /,
) -> None: ...
def rms_norm(x: int, weight: int, rows: int, columns: int, eps: float, y: int, output: int, /) -> None: ...
def embed(
    tokens: int, count: int, table: int, vocab: int, columns: int, type: int, scale: float, y: int, /
) -> None: ...
def soft_cap(x: int, rows: int, columns: int, cap: float, /) -> None: ...
def rotate_and_store(qkv: int, type: int, heads: int, /, *places_and_rest: float) -> None: ...
def attention(q: int, type: int, heads: int, /, *places_and_rest: float) -> None: ...
def read(memory: int, size: int, /) -> int: ...
def gumbel(seed: int, position: int, tokens: int, count: int, out: int, /) -> None: ...
def choose(
    logits: int, temperatures: int, seeds: int, positions: int, count: int, columns: int, tokens: int, /
) -> None: ...
def uniform(seed: int, position: int, tokens: int, count: int, out: int, /) -> None: ...

BULK_DONE: int
BULK_BLOCKED: int
BULK_ENDED: int
BULK_CANCELLED: int
BULK_YIELDED: int

class Bulk:
    """Pieces of memory on their way over a non-blocking socket.

    `send` and `receive` return one of the numbers above, or an errno with a minus sign.
    """

    def __init__(self, buffers: Sequence[Buffer], writable: bool) -> None: ...
    def send(self, socket: int, /) -> int: ...
    def receive(self, socket: int, /) -> int: ...
    def fill(self, data: bytes, /) -> int: ...
    def cancel(self) -> None: ...
    def finish(self) -> list[int]: ...

def crc32c(data: Buffer, crc: int = 0, wide: bool = True) -> int: ...

class Program:
    """The functions above with a slot's number for an activation and a KV group for its tables."""

    def embed(self, table: int, vocab: int, columns: int, type: int, scale: float, y: int, /) -> None: ...
    def linear(
        self,
        x: int,
        packed: int,
        bias: int,
        outputs: int,
        inputs: int,
        type: int,
        packed_type: int,
        gate: int,
        y: int,
        y_stride: int,
        output: int,
        /,
    ) -> None: ...
    def rms_norm(self, x: int, weight: int, columns: int, eps: float, y: int, output: int, /) -> None: ...
    def soft_cap(self, x: int, columns: int, cap: float, /) -> None: ...
    def rotate_and_store(self, qkv: int, type: int, heads: int, group: int, /, *rest: float) -> None: ...
    def attention(self, q: int, type: int, heads: int, group: int, /, *rest: float) -> None: ...
    def place(self, offsets: list[int], /) -> None: ...
    def run(
        self,
        x: int,
        rows: int,
        y: int,
        workspace: int,
        query_start: int,
        positions: int,
        sequences: int,
        tokens: int,
        tables: list[tuple[int, int, int]],
        /,
    ) -> None: ...
