"""Text: the vocabulary, prepared corpora, blocks and batches, GLUE's files and metrics."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import text as T  # noqa: E402


def test_shared_glue(shared):
    for name, n, positive in (("SST-2", 6917, 3608), ("CoLA", 8533, 6008)):
        task, splits = T.open_task(str(shared / "text" / "glue"), name)
        rows = splits["train"].rows
        assert len(rows) == n and sum(label for _, _, label in rows) == positive and not splits["train"].bad
