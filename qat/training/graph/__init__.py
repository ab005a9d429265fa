"""A whole optimizer step as one CUDA graph (`trainer.graph`): what a replay needs to be right, and what it refuses.

Nothing here has run on a GPU yet: its parts are tested on a CPU, where a step is computed again in place of a replay.
"""

from qat.training.graph.checks import check_graph as check_graph
