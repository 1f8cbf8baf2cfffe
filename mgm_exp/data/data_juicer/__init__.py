"""Data-Juicer: its operators' values for image-caption pairs, its recipes, its captioning mapper.

    report = measure(pairs, images, operators_of(config.data.recipe), work=work, out=out)

Data-Juicer itself runs in a process of its own (:mod:`.worker`), with its traps closed (:mod:`.guards`). Nothing here
imports it, so that everything else works where it is not installed.
"""

from mgm_exp.data.data_juicer.builtin import measure_builtin
from mgm_exp.data.data_juicer.captioning import caption_with_mapper
from mgm_exp.data.data_juicer.emit import recipe_yaml, write_recipe
from mgm_exp.data.data_juicer.installed import require_data_juicer
from mgm_exp.data.data_juicer.measuring import measure
from mgm_exp.data.data_juicer.operators import Operator, operators_of
from mgm_exp.data.data_juicer.pairs import Pair
from mgm_exp.data.data_juicer.report import MeasureReport

__all__ = [
    "MeasureReport",
    "Operator",
    "Pair",
    "caption_with_mapper",
    "measure",
    "measure_builtin",
    "operators_of",
    "recipe_yaml",
    "require_data_juicer",
    "write_recipe",
]
