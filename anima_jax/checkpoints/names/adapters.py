"""Names of adapter files: the trainer's, which are ComfyUI's, derived from the base model's table."""

from anima_jax.checkpoints.names import LINEAR, Rule
from anima_jax.checkpoints.names.dit import RULES as DIT_RULES

PREFIX = "diffusion_model."

_KERNEL, _WEIGHT = r"\.kernel", ".weight"

LORA_RULES = tuple(
    Rule(
        rule.path.removesuffix(_KERNEL) + rf"\.{ours}", PREFIX + rule.name.removesuffix(_WEIGHT) + f".{theirs}", LINEAR
    )
    for rule in DIT_RULES
    if rule.path.endswith(_KERNEL) and "{layer}" in rule.name
    for ours, theirs in (("lora_a", "lora_A.weight"), ("lora_b", "lora_B.weight"))
)
