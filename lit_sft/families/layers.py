"""Which layers see a sliding window only, spelled layer by layer (layer_types) or by the rule of older files."""

from collections.abc import Callable

from lit_sft.errors import InputError
from lit_sft.families.fields import Fields


def read_window(
    fields: Fields, n_layer: int, slides: Callable[[int], bool], default: int | None = None, used: bool = True
) -> dict:
    """ModelConfig's window fields.

    Args:
        fields: of the config.json.
        n_layer: how many layers there are.
        slides: the family's rule where ``layer_types`` is absent: whether a layer, counted from 0, has the window.
        default: the window where the file names none.
        used: false where something else in the file says that no layer has it.

    InputError for layers of another kind, and for layers that should slide while no window is in use.
    """
    window = fields.given("sliding_window", default)
    window = window if used else None
    kinds = fields.get("layer_types")
    if kinds is None:
        sliding = tuple(window is not None and slides(layer) for layer in range(n_layer))
    else:
        if odd := next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention")), None):
            raise InputError(f"config.json: layer_types has {odd!r}, which is not supported")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    if any(sliding) and window is None:
        raise InputError("config.json: layer_types has 'sliding_attention', yet no sliding_window is in use")
    return {"sliding_window": window, "sliding_layers": sliding} if any(sliding) else {}
