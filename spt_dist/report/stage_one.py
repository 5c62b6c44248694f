"""What stage 1 found, as files: mean scores and sensitivity patterns."""

from collections.abc import Sequence
from pathlib import Path

from spt_dist.report.figures import draw_block_patterns, draw_densities, draw_operation_patterns, draw_scores
from spt_dist.report.patterns import TAUS, Patterns, find_patterns, mean_scores
from spt_dist.sensitivity.scores import Scores
from spt_dist.sensitivity.shards import get_rank


def report_scores(
    scores: Scores, folder: str | Path, taus: Sequence[int | float] = TAUS, suffix: str = ""
) -> tuple[Patterns, dict[str, Path]]:
    """Write pictures of the mean scores and of the patterns, and the patterns as JSON. Collective; rank 0 writes.

    Args:
        scores: the result of stage 1.
        folder: where the files go.
        taus: numbers of most sensitive weights, see ``patterns.resolve_taus``.
        suffix: of the files' names, to keep apart those of several runs in one folder.

    Returns:
        The patterns, and what lies where: description -> path.

    Raises:
        UserError: as ``patterns.resolve_taus``.
    """
    means, patterns = mean_scores(scores), find_patterns(scores, taus)
    files = {
        "picture of scores": Path(folder, f"scores{suffix}.png"),
        "patterns": Path(folder, f"patterns{suffix}.json"),
        "patterns by block": Path(folder, f"patterns_blocks{suffix}.png"),
        "patterns by operation": Path(folder, f"patterns_operations{suffix}.png"),
        "patterns by both": Path(folder, f"patterns_density{suffix}.png"),
    }
    if get_rank() == 0:
        draw_scores(means, files["picture of scores"])
        patterns.save(files["patterns"])
        draw_block_patterns(patterns, files["patterns by block"])
        draw_operation_patterns(patterns, files["patterns by operation"])
        draw_densities(patterns, files["patterns by both"])
    return patterns, files
