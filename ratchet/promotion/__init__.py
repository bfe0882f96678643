"""Keep the champion, rollouts and lineage, and test rollouts sequentially."""
