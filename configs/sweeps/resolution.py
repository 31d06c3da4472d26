"""python -m openvla_jax.sweep --sweep configs/sweeps/resolution.py --workdir runs/sweeps/resolution

Pixels that the towers see, at one patch size, so 1, 4 and 16 patches (section 3.4: 224 or 384). The task's frames have
48: 96 are the same frames, enlarged.
"""

from openvla_jax.sweep import axis, zipped


def get_sweep():
    sizes = [24, 48, 96]
    return "configs/ablation.py", zipped(
        *(axis(f"model.towers.{name}.image_size", sizes) for name in ("dino", "siglip"))
    )
