"""Reading config.json with its types checked, and the spellings that families share.

A field that is present with the wrong type is refused by name; a field that would change the arithmetic
in a way that is not implemented here is refused by `Fields.refuse_unless`. Fields that transformers'
class for the architecture does not read either are ignored, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Final

from headrace.models.config import (
    Activation,
    DefaultRotary,
    DynamicRotary,
    LinearRotary,
    Llama3Rotary,
    Rotary,
    UnsupportedModelError,
    YarnRotary,
    require,
)

_REQUIRED: Final = object()

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Fields by which checkpoints that borrow a supported architecture's name announce other arithmetic.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "use_bidirectional_attention": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "position_embedding_type": (None, "rotary", "rope"),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
}


class Fields:
    """The values of a config.json, or of an object nested in it at `path`."""

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, field: str) -> str:
        return f"{self._path}{field}"

    def __contains__(self, field: str) -> bool:
        return field in self._values

    def value(self, field: str, default: object = _REQUIRED) -> object:
        if field in self._values:
            return self._values[field]
        if default is _REQUIRED:
            raise UnsupportedModelError(f"config.json: {self.name(field)} is missing")
        return default

    def integer(self, field: str, default: object = _REQUIRED) -> int:
        value = self.value(field, default)
        require(type(value) is int, self.name(field), value, "an integer")
        assert isinstance(value, int)
        return value

    def optional_integer(self, field: str, default: int | None = None) -> int | None:
        return None if self.value(field, default) is None else self.integer(field, default)

    def number(self, field: str, default: object = _REQUIRED) -> float:
        value = self.value(field, default)
        require(type(value) in (int, float), self.name(field), value, "a number")
        assert isinstance(value, int | float)
        return float(value)

    def optional_number(self, field: str) -> float | None:
        return None if self.value(field, None) is None else self.number(field)

    def flag(self, field: str, default: bool) -> bool:
        value = self.value(field, default)
        require(isinstance(value, bool), self.name(field), value, "true or false")
        return value is True

    def nested(self, field: str) -> Fields | None:
        value = self.value(field, None)
        if value is None:
            return None
        require(isinstance(value, Mapping), self.name(field), value, "an object")
        assert isinstance(value, Mapping)
        return Fields(value, f"{self.name(field)}.")

    def at_most_one(self, one: str, other: str) -> tuple[Fields | None, Fields | None]:
        """Two nested objects that spell the same thing; refuses both at once."""
        first, second = self.nested(one), self.nested(other)
        if first and second:
            raise UnsupportedModelError(
                f"config.json: both {self.name(one)} and {self.name(other)} are given; supported: one of them"
            )
        return first, second

    def refuse_unless(self, field: str, *neutral: object) -> None:
        """Refuse the field unless it is absent or one of `neutral`."""
        if field in self._values:
            value = self._values[field]
            supported = " or ".join(repr(each) for each in neutral)
            require(value in neutral, self.name(field), value, supported)

    def refuse_foreign_arithmetic(self) -> None:
        for field, neutral in _NEUTRAL.items():
            self.refuse_unless(field, *neutral)

    def refuse_others(self, known: frozenset[str]) -> None:
        """Refuse every field outside `known` that is not null."""
        for field, value in self._values.items():
            if field not in known and value is not None:
                raise UnsupportedModelError(
                    f"config.json: {self.name(field)} is {value!r}, which is not implemented; "
                    f"supported here: {', '.join(sorted(known))}"
                )

    def activation(self, field: str, default: str) -> Activation:
        value = self.value(field, default)
        require(value in _ACTIVATIONS, self.name(field), value, ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[str(value)]

    def layer_types(self, layers: int) -> tuple[bool, ...] | None:
        """`layer_types` as "this layer slides", or None where the field is absent or null."""
        value = self.value("layer_types", None)
        if value is None:
            return None
        kinds = {"full_attention": False, "sliding_attention": True}
        require(isinstance(value, list), self.name("layer_types"), value, "a list")
        assert isinstance(value, list)
        for kind in value:
            require(kind in kinds, self.name("layer_types"), kind, ", ".join(kinds))
        require(
            len(value) == layers, self.name("layer_types"), value, f"one entry for each of {layers} layers"
        )
        return tuple(kinds[kind] for kind in value)


def rotary_and_positions(fields: Fields, theta: float = 10000.0) -> tuple[Rotary, int]:
    """The rotary settings of a model that has one for all layers, and the positions they are meant for.

    Reads `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` (before); `theta` is the
    family's base where neither gives one. Linear, dynamic and YaRN scaling extend `max_position_embeddings`,
    Llama 3's is already in it.
    """
    positions = fields.integer("max_position_embeddings")
    scaling, parameters = fields.at_most_one("rope_scaling", "rope_parameters")
    rotary = read_rotary(
        scaling or parameters or Fields({}, fields.name("rope_parameters.")),
        theta=fields.number("rope_theta", theta),
        positions=positions,
        original_positions=fields.optional_integer("original_max_position_embeddings"),
    )
    match rotary:
        case LinearRotary() | DynamicRotary():
            return rotary, int(positions * rotary.factor)
        case YarnRotary():
            return rotary, max(positions, int(rotary.original_max_positions * rotary.factor))
        case _:
            return rotary, positions


def read_rotary(
    rope: Fields, *, theta: float, positions: int, original_positions: int | None = None
) -> Rotary:
    """One object of rotary settings in either spelling.

    theta, positions, original_positions: what the model says outside of the object.
    """
    kind = rope.value("rope_type", rope.value("type", "default"))
    theta = rope.number("rope_theta", theta)
    rope.refuse_unless("partial_rotary_factor", None, 1.0)
    common = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})

    def original() -> int:
        return original_positions or rope.integer("original_max_position_embeddings", positions)

    match kind:
        case "default":
            rope.refuse_others(common)
            return DefaultRotary(theta)
        case "linear":
            rope.refuse_others(common | {"factor", "original_max_position_embeddings"})
            return LinearRotary(theta, rope.number("factor"))
        case "dynamic":
            rope.refuse_others(common | {"factor", "original_max_position_embeddings"})
            rope.refuse_unless("original_max_position_embeddings", None, positions)
            return DynamicRotary(theta, rope.number("factor"), positions)
        case "llama3":
            rope.refuse_others(
                common | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
            )
            return Llama3Rotary(
                theta,
                rope.number("factor"),
                rope.number("low_freq_factor"),
                rope.number("high_freq_factor"),
                original(),
            )
        case "yarn":
            rope.refuse_others(
                common
                | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
                | {"mscale", "mscale_all_dim", "truncate"}
            )
            factor = rope.optional_number("factor") or positions / original()
            return YarnRotary(
                theta,
                factor,
                original(),
                rope.optional_number("beta_fast") or 32.0,
                rope.optional_number("beta_slow") or 1.0,
                _yarn_attention_factor(rope, factor),
                rope.flag("truncate", True),
            )
        case _:
            raise UnsupportedModelError(
                f"config.json: {rope.name('rope_type')} is {kind!r}; "
                "supported: default, linear, dynamic, llama3, yarn"
            )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """As given, or the paper's 0.1 ln(factor) + 1, or DeepSeek's ratio of two such terms."""

    def term(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0

    given = rope.optional_number("attention_factor")
    if given is not None:
        return given
    mscale, all_dim = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if mscale and all_dim:
        return term(mscale) / term(all_dim)
    return term(1.0)
