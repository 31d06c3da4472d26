"""Mixtures: named lists of datasets with sampling weights.

18 are OpenVLA's, five are OpenVLA-OFT's and one is Octo's. Every dataset stands once in a mixture. A weight counts
relative to the size of its dataset: 1.0 is one pass over it for one pass over any other dataset of weight 1.0.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from openvla_jax.config import did_you_mean
from openvla_jax.data.oxe.datasets import DATASETS
from openvla_jax.errors import InputError

Mixture = tuple[tuple[str, float], ...]

_RTX = (
    ("fractal20220817_data", 0.54087122203),
    ("kuka", 0.8341046294),
    ("bridge_orig", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 2.0),
    ("berkeley_cable_routing", 3.0),
    ("roboturk", 1.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 1.0),
    ("toto", 1.0),
)
# The reference lists taco_play, berkeley_cable_routing, viola and toto a second time with weight 1 and then ignores the
# second mention. berkeley_rpt has joint actions and is not trained on.
_FRANKA = (
    ("stanford_hydra_dataset_converted_externally_to_rlds", 1.0),
    ("austin_buds_dataset_converted_externally_to_rlds", 3.0),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
    ("maniskill_dataset_converted_externally_to_rlds", 0.1),
    ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
    ("cmu_franka_exploration_dataset_converted_externally_to_rlds", 5.0),
    ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
    ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
    ("berkeley_rpt_converted_externally_to_rlds", 1.0),
    ("kaist_nonprehensile_converted_externally_to_rlds", 3.0),
    ("stanford_robocook_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("cmu_play_fusion", 1.0),
)
_MAGIC_SOUP = (
    ("fractal20220817_data", 0.54087122203),
    ("kuka", 0.8341046294),
    ("bridge_orig", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 1.0),
    ("berkeley_cable_routing", 1.0),
    ("roboturk", 2.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 2.0),
    ("toto", 1.0),
    ("language_table", 0.1),
    ("stanford_hydra_dataset_converted_externally_to_rlds", 2.0),
    ("austin_buds_dataset_converted_externally_to_rlds", 1.0),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
    ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
    ("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0),
    ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
    ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
    ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("berkeley_fanuc_manipulation", 2.0),
    ("cmu_stretch", 1.0),
)
_MAGIC_SOUP_PLUS = (
    *_MAGIC_SOUP,
    ("bc_z", 0.2),  # version 0.1.0 of the dataset: the later ones have other keys
    ("fmb_dataset", 1.0),
    ("dobbe", 0.2),
    ("droid", 0.06),
)
# What the released OpenVLA ended on. DROID was in the mixture for the first two thirds of the training.
_MAGIC_SOUP_PLUS_MINUS = tuple(
    (name, 1.0 if name == "fractal20220817_data" else weight)
    for name, weight in _MAGIC_SOUP_PLUS
    if name not in ("language_table", "droid")
)
# Octo's. gnm_dataset and the two aloha_* datasets were never released; berkeley_mvp and roboset have joint actions.
_FLEX_ACT_SOUP = (
    ("fractal20220817_data", 0.54087122203),
    ("kuka", 0.8341046294),
    ("bridge_dataset", 1.0),
    ("taco_play", 2.0),
    ("jaco_play", 1.0),
    ("berkeley_cable_routing", 1.0),
    ("roboturk", 2.0),
    ("nyu_door_opening_surprising_effectiveness", 1.0),
    ("viola", 2.0),
    ("berkeley_autolab_ur5", 2.0),
    ("toto", 1.0),
    ("language_table", 0.1),
    ("stanford_hydra_dataset_converted_externally_to_rlds", 2.0),
    ("austin_buds_dataset_converted_externally_to_rlds", 1.0),
    ("nyu_franka_play_dataset_converted_externally_to_rlds", 3.0),
    ("furniture_bench_dataset_converted_externally_to_rlds", 0.1),
    ("ucsd_kitchen_dataset_converted_externally_to_rlds", 2.0),
    ("austin_sailor_dataset_converted_externally_to_rlds", 1.0),
    ("austin_sirius_dataset_converted_externally_to_rlds", 1.0),
    ("bc_z", 0.2),
    ("berkeley_mvp_converted_externally_to_rlds", 1.0),
    ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0),
    ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", 1.0),
    ("utaustin_mutex", 1.0),
    ("berkeley_fanuc_manipulation", 2.0),
    ("cmu_stretch", 1.0),
    ("gnm_dataset", 1.0),
    ("aloha_static_dataset", 3.0),
    ("aloha_mobile_dataset", 2.0),
    ("dobbe", 1.0),
    ("roboset", 0.5),
    ("rh20t", 0.5),
)
_LIBERO = ("libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops")
_SINGLE = (
    "tdroid_carrot_in_bowl",
    "tdroid_pour_corn_in_pot",
    "tdroid_flip_pot_upright",
    "tdroid_move_object_onto_plate",
    "tdroid_knock_object_over",
    "tdroid_cover_object_with_towel",
    "droid_wipe",
    *_LIBERO,
    "aloha1_fold_shorts_20_demos",
    "aloha1_fold_shirt_30_demos",
    "aloha1_scoop_X_into_bowl_45_demos",
    "aloha1_put_X_into_pot_300_demos",
)

MIXTURES: dict[str, Mixture] = {
    "bridge": (("bridge_orig", 1.0),),
    "bridge_rt_1": (("bridge_orig", 1.0), ("fractal20220817_data", 1.0)),
    "rtx": _RTX,
    "rtx_franka": _RTX + _FRANKA,
    "oxe_magic_soup": _MAGIC_SOUP,
    "oxe_magic_soup_plus": _MAGIC_SOUP_PLUS,
    "oxe_magic_soup_plus_minus": _MAGIC_SOUP_PLUS_MINUS,
    **{name: ((name, 1.0),) for name in _SINGLE},
    "libero_4_task_suites_no_noops": tuple((name, 1.0) for name in _LIBERO),
    "oxe_flex_act_soup": _FLEX_ACT_SOUP,
}


def resolve_mixture(
    mixture: str | Sequence[tuple[str, float]],
    datasets: Collection[str] = DATASETS.keys(),
    mixtures: Mapping[str, Mixture] = MIXTURES,
) -> Mixture:
    """The (dataset, weight) pairs that a name or a list of pairs stands for.

    mixture: a name in mixtures, the name of one dataset (weight 1.0), or pairs given by the user. datasets: the names
    of all configured datasets, the user's own included. ValueError names all unknown datasets, each with a known name
    that is close, a dataset given twice, and a weight that is not a positive number. Datasets that are configured but
    not supported (`DatasetConfig.supported`) are returned like the others.
    """
    if isinstance(mixture, str):
        mixture = mixtures.get(mixture, ((mixture, 1.0),))
    pairs = tuple((name, float(weight)) for name, weight in mixture)
    names = [name for name, _ in pairs]
    if not pairs:
        raise InputError("the mixture is empty; name a mixture, a dataset, or give (dataset, weight) pairs")
    unknown = [name for name in names if name not in datasets]
    if unknown:
        known = sorted({*datasets, *mixtures})
        hints = [" ".join([repr(name), *(f"({hint})" for hint in did_you_mean(name, known))]) for name in unknown]
        raise InputError(f"unknown dataset or mixture {', '.join(hints)}; fix the name, or configure it in data.module")
    for name, weight in pairs:
        if names.count(name) > 1:
            raise InputError(f"dataset {name!r} is given twice in the mixture; give it once, with one weight")
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"weight {weight} of dataset {name!r} must be a positive number")
    return pairs
