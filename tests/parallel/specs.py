"""specs.txt: the sharding of every parameter of the released networks on each mesh, for review.

python -m tests.parallel.specs > tests/parallel/specs.txt
"""

import itertools
import textwrap

from anima_jax.adapters import modules
from anima_jax.adapters.kinds import TRAINABLE
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from anima_jax.models.wan_vae import WanVAE, WanVAEConfig
from anima_jax.parallel import rules
from tests.parallel.meshes import MESHES, name


def _transformer(rngs) -> AnimaDiT:
    """The transformer with an adapter of rank 32 on every layer that can have one, all kinds in turn."""
    model, kinds = AnimaDiT(DiTConfig(), rngs=rngs), itertools.cycle(TRAINABLE)
    shapes = modules.target_shapes(model).items()
    modules.attach(model, {path: modules.adapter_spec(next(kinds), shape, [32] * shape[0]) for path, shape in shapes})
    return model


NETWORKS = {
    "transformer": _transformer,
    "text encoder": lambda rngs: Qwen3(Qwen3Config(), rngs=rngs),
    "control network": lambda rngs: ControlNetwork(ControlConfig(dilations=(1, 2, 4, 8), layers=LAYERS), rngs=rngs),
    "VAE": lambda rngs: WanVAE(WanVAEConfig(), rngs=rngs),
}


def table() -> str:
    """Return a line for each sharded parameter: its shape, spec, and shape on a device of each of `MESHES`."""
    lines = [f"meshes ({', '.join(rules.AXES)}): {', '.join(map(name, MESHES))}"]
    for network, build in NETWORKS.items():
        replicated = []
        lines += ["", f"# {network}"]
        for path, leaf in sorted(parameters.abstract(build)[1].items()):
            (spec,) = {rules.partition_spec(path, leaf.shape, sizes) for sizes in MESHES}
            if not any(spec):
                replicated.append(path)
                continue
            parts = [
                [size // rules.parts(axes, sizes) for size, axes in zip(leaf.shape, spec, strict=True)]
                for sizes in MESHES
            ]
            shapes = ["×".join(map(str, shape)) for shape in (leaf.shape, *parts)]
            axes = ", ".join("+".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in spec)
            lines.append(f"{path} {shapes[0]} ({axes}): {' '.join(shapes[1:])}")
        lines += ["replicated:", *textwrap.wrap(", ".join(replicated), 110, break_long_words=False)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
