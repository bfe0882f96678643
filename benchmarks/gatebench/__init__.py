"""GateBench: rules of promotion, ours and those in use elsewhere, judge the same pairs of real models."""
